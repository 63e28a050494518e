"""The training loop: AdamW, warm-up and cosine decay, an average of what is trained, and a state that survives."""

import json
import math
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dit2deploy.artefacts import unfinished
from dit2deploy.base.errors import Failed
from dit2deploy.base.files import TensorFile, write_tensors
from dit2deploy.base.progress import note, report
from dit2deploy.nn.train_linear import trainable_linears
from dit2deploy.stages.finetune.examples import Batch, answer
from dit2deploy.stages.finetune.settings import Settings

LINES = 40  # of the journal, in a training that takes all its steps
TRIAL = 5  # steps after which the time is estimated


class Training:
    """A student on its way. All that a step depends on goes to disk and back in `save` and `restore`."""

    def __init__(
        self,
        student: torch.nn.Module,
        settings: Settings,
        generator: torch.Generator,
        *,
        phases: Sequence[Collection[str]] = (),
    ) -> None:
        """`phases` are names of layers: equal parts of the training train those of one set each. None: all the time."""
        self.student, self.settings, self.generator = student, settings, generator
        self.layers, self.phases = dict(trainable_linears(student)), phases
        slow, fast = {}, {}
        for name, layer in self.layers.items():
            layer.requires_grad_(not phases)
            if not phases or any(name in phase for phase in phases):
                for leaf, parameter in layer.named_parameters():
                    (slow if leaf == "latent" else fast)[f"{name}.{leaf}"] = parameter
        if settings.trained == "branch":
            for parameter in slow.values():
                parameter.requires_grad_(False)
            slow = {}
        self.parameters = {**slow, **fast}
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        rates = ((slow, settings.learning_rate), (fast, settings.branch_learning_rate))
        groups = [{"params": list(group.values()), "lr": rate, "peak": rate} for group, rate in rates if group]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.step, self.seconds = 0, 0.0
        self.losses: list[list[float]] = []  # [step, mean loss since the line before]
        self.recent: list[float] = []

    def advance(self, drawn: list[Batch], fraction: float) -> None:
        """One step; `fraction` of the training is over. Raises Failed where the loss is not finite."""
        settings = self.settings
        if settings.schedule:
            bits = settings.schedule[int(fraction * len(settings.schedule))]
            for layer in self.layers.values():
                layer.set_least_bits(bits)
        if self.phases:
            phase = self.phases[int(fraction * len(self.phases))]
            for name, layer in self.layers.items():
                layer.requires_grad_(name in phase)
        rate = (1 + math.cos(math.pi * fraction)) / 2
        if settings.warmup:
            rate *= min(1.0, (fraction + 1 / settings.steps) / settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in drawn:
            loss = loss_of(answer(self.student, batch.inputs), batch, settings.data_weight) / len(drawn)
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise Failed(
                f"finetune: the loss is {total} at step {self.step + 1}.",
                "Lower the learning rates; if it is so at step 1, look for NaN in the model and the data.",
            )
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip_norm)
        self.optimizer.step()
        for layer in self.layers.values():
            layer.settle()
        self.step += 1
        # Few steps are averaged briefly at first, so that the start is soon forgotten.
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        self.recent.append(total)

    def log(self) -> float:
        """Adds a line to the journal and returns its loss."""
        mean = sum(self.recent) / len(self.recent)
        self.losses.append([self.step, mean])
        self.recent.clear()
        return mean

    def use_average(self) -> None:
        """Ends the training: the student becomes the average of its steps, at the policy's activation bits."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])
        for layer in self.layers.values():
            layer.set_least_bits(1)

    def save(self, path: Path, key: str) -> None:
        tensors = {f"now.{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{kind}.{name}": value for kind, value in self.optimizer.state[parameter].items()}
        tensors["generator"] = self.generator.get_state()
        progress = {"step": self.step, "seconds": self.seconds, "losses": self.losses, "recent": self.recent}
        arrays = {name: value.numpy() for name, value in tensors.items()}
        write_tensors(path, arrays, {"key": key, "progress": json.dumps(progress)})

    def restore(self, state: TensorFile) -> None:
        def read(name: str) -> torch.Tensor:
            return torch.from_numpy(state.read(name))

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(read(f"now.{name}"))
                self.average[name].copy_(read(f"average.{name}"))
                kinds = [kind for kind in ("step", "exp_avg", "exp_avg_sq") if f"{kind}.{name}" in state]
                if kinds:  # none for what a later phase will train
                    self.optimizer.state[parameter] = {kind: read(f"{kind}.{name}") for kind in kinds}
        self.generator.set_state(read("generator"))
        for field, value in json.loads(state.metadata["progress"]).items():
            setattr(self, field, value)


def loss_of(output: torch.Tensor, batch: Batch, data_weight: float) -> torch.Tensor:
    """Squared error against the teacher's whole output, and weighted against the data's target, which learned sigma
    has no part in (methods.md 3.6; that the teacher comes first is our choice)."""
    loss = torch.nn.functional.mse_loss(output, batch.teacher)
    if batch.data is not None and data_weight:
        loss = loss + data_weight * torch.nn.functional.mse_loss(output[:, : batch.data.shape[1]], batch.data)
    return loss


def train(
    training: Training,
    drawn: Iterator[list[Batch]],
    *,
    minutes: float | None,
    save_every: int,
    state: Path,
    key: str,
) -> None:
    """Runs to the end; goes on from `state` where that is of the same `key`. `minutes` cut it short, fully decayed."""
    settings = training.settings
    if state.exists():
        found = TensorFile(state, cure=f"Remove {state.parent} and run again.")
        if found.metadata.get("key") == key:
            training.restore(found)
            note(f"finetune: goes on from step {training.step} of an earlier run")
        else:
            note(f"finetune: {state.parent} is of other inputs or settings; starts anew")
    begun, first = time.monotonic() - training.seconds, training.step
    every = max(1, settings.steps // LINES)
    report("finetune", training.step, settings.steps)
    while True:
        training.seconds = time.monotonic() - begun
        fraction = training.step / settings.steps
        if minutes is not None:
            fraction = max(fraction, training.seconds / (60 * minutes))
        if fraction >= 1:
            break
        before = time.monotonic()
        training.advance(next(drawn), fraction)
        # The first steps also allocate memory and warm caches: the estimate takes a later one.
        if training.step - first == TRIAL and training.step < settings.steps:
            seconds = time.monotonic() - before
            left = (settings.steps - training.step) * seconds
            if minutes is not None:
                left = min(left, 60 * minutes - training.seconds)
            note(f"finetune: about {seconds:.2f} s a step, {left / 60:.1f} min to go")
        if training.step % every == 0:
            note(f"finetune: step {training.step}, loss {training.log():.6f}")
        report("finetune", training.step, settings.steps)
        if training.step % save_every == 0:
            training.seconds = time.monotonic() - begun
            training.save(state, key)
            unfinished.tell(state.parent, "finetune", "steps", done=training.step, total=settings.steps)
    if training.recent:
        training.log()
    report("finetune", settings.steps, settings.steps)


def packed(training: Training) -> dict[str, dict[str, np.ndarray]]:
    """The checkpoint's tensors of each layer, by layer and suffix."""
    return {name: layer.pack() for name, layer in training.layers.items()}
