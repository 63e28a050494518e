"""What is trained on: inputs of the transformer with the teacher's outputs, and images in latent space."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import TensorFile
from dit2deploy.base.progress import track
from dit2deploy.models.load import ModelFolder
from dit2deploy.sampling import Scheduler, initial_noise, trajectory

FIRST_SEED = 1 << 22  # evaluation draws its noise from small seeds, calibration from 1 << 20 on
TOGETHER = 16  # trajectories in one batch
LABEL_DROPOUT = 0.1  # as classifier-free guidance is trained (https://arxiv.org/abs/2207.12598)

Inputs = dict[str, torch.Tensor]


def answer(network: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """The transformer's output for keyword arguments [B, ..]."""
    return network(**inputs, return_dict=False)[0]


def recorded(teacher: torch.nn.Module, calibration: CalibrationSet) -> dict[str, np.ndarray]:
    """The calibration set's tensors [C, B, ..] and, as `target`, the teacher's outputs."""
    held = {name: calibration.tensors.read(name) for name in calibration.tensors}
    with torch.no_grad():
        targets = [
            answer(teacher, {name: torch.from_numpy(value[index]) for name, value in held.items()}).numpy()
            for index in track(range(len(calibration)), "finetune: the teacher's answers")
        ]
    return {**held, "target": np.stack(targets)}


def fresh(
    teacher: torch.nn.Module, source: ModelFolder, calibration: CalibrationSet, *, count: int, seed: int
) -> dict[str, np.ndarray]:
    """Every call [C * B, ..] of the teacher on `count` new trajectories of random classes, with its outputs.

    They are sampled as the calibration set was: the same number of DDIM steps, the same guidance.
    """
    family, manifest = source.family, calibration.manifest
    classes, shape = family.classes_and_shape(teacher.config)
    labels = np.random.default_rng([FIRST_SEED, seed]).integers(classes, size=count)
    scheduler = Scheduler.from_config(source.scheduler_config)
    seeds = [FIRST_SEED + seed * count + index for index in range(count)]
    parts: dict[str, list[np.ndarray]] = {"hidden_states": [], "timestep": [], "class_labels": [], "target": []}

    def denoise(latents: np.ndarray, timesteps: np.ndarray, labels: np.ndarray) -> np.ndarray:
        values = latents, timesteps, labels
        call = dict(zip(("hidden_states", "timestep", "class_labels"), values, strict=True))
        with torch.no_grad():
            output = answer(teacher, {name: torch.from_numpy(value) for name, value in call.items()}).numpy()
        for name, value in (*call.items(), ("target", output)):
            parts[name].append(value)
        return output

    for at in track(range(0, count, TOGETHER), "finetune: fresh trajectories"):
        steps = trajectory(
            denoise,
            scheduler=scheduler,
            labels=labels[at : at + TOGETHER],
            steps=manifest.steps,
            guidance=manifest.guidance,
            noise=initial_noise(seeds[at : at + TOGETHER], shape),
            null_label=classes,
        )
        for _ in steps:
            pass
    return {name: np.concatenate(values) for name, values in parts.items()}


def pool_of(
    teacher: torch.nn.Module, source: ModelFolder, calibration: CalibrationSet, *, trajectories: int, seed: int
) -> dict[str, np.ndarray]:
    """Inputs and `target` with a leading axis of what one draw takes.

    That is a sample where the model is class-conditional; otherwise a recorded call, as not all inputs of other
    families have an axis of samples, and no text encoder is at hand to make new ones.
    """
    found = recorded(teacher, calibration)
    if source.family.conditioning != "class":
        return found
    found = {name: value.reshape(-1, *value.shape[2:]) for name, value in found.items()}
    if trajectories and source.scheduler_config is not None:
        more = fresh(teacher, source, calibration, count=trajectories, seed=seed)
        found = {name: np.concatenate([value, more[name]]) for name, value in found.items()}
    return found


@dataclass(frozen=True)
class Images:
    """`images` float32 [N, C, H, W] in the model's latent space and `labels` int64 [N], noised as for training."""

    images: torch.Tensor
    labels: torch.Tensor
    scheduler: Scheduler
    null_label: int

    @classmethod
    def load(cls, path: Path, source: ModelFolder, config) -> "Images":
        """Raises Misuse for a file that lacks these tensors or holds others than the model takes."""
        if source.family.conditioning != "class" or source.scheduler_config is None:
            raise Misuse(
                f"{path}: images are of use to class-conditional pipelines only.",
                "Train without --data, or give the pipeline's folder with its scheduler.",
            )
        file = TensorFile(path)
        images, labels = file.read("images"), file.read("labels")
        classes, shape = source.family.classes_and_shape(config)
        if images.dtype != np.float32 or images.shape[1:] != shape or not len(images):
            raise Misuse(
                f"{path}: images are {images.dtype} {list(images.shape)}.",
                f"Give float32 [N, {', '.join(map(str, shape))}], at least one.",
            )
        if (
            labels.dtype != np.int64
            or labels.shape != images.shape[:1]
            or not ((labels >= 0) & (labels < classes)).all()
        ):
            raise Misuse(f"{path}: the labels are not a class an image.", f"Give int64 [N] in 0..{classes - 1}.")
        scheduler = Scheduler.from_config(source.scheduler_config)
        return cls(torch.from_numpy(images), torch.from_numpy(labels), scheduler, classes)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Inputs, torch.Tensor]:
        """Keyword arguments of a call and what the data asks for, by the scheduler's prediction type.

        One timestep lies in each of `count` equal bands, which lowers the variance of the gradient.
        """
        chosen = torch.randint(len(self.images), (count,), generator=generator)
        bands = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        timesteps = (bands * self.scheduler.num_train_timesteps).long()
        timesteps = timesteps.clamp_(max=self.scheduler.num_train_timesteps - 1)
        dropped = torch.rand(count, generator=generator) < LABEL_DROPOUT
        images = self.images[chosen]
        noise = torch.randn(images.shape, generator=generator)
        alpha = torch.from_numpy(self.scheduler.alphas_cumprod)[timesteps].view(-1, 1, 1, 1)
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        inputs = {
            "hidden_states": signal * images + sigma * noise,
            "timestep": timesteps,
            "class_labels": torch.where(dropped, self.null_label, self.labels[chosen]),
        }
        targets = {"epsilon": noise, "sample": images, "v_prediction": signal * noise - sigma * images}
        return inputs, targets[self.scheduler.prediction_type]


@dataclass(frozen=True)
class Batch:
    inputs: Inputs
    teacher: torch.Tensor  # what the teacher says
    data: torch.Tensor | None  # what the data asks for


def batches(
    pool: dict[str, np.ndarray],
    images: Images | None,
    teacher: torch.nn.Module,
    *,
    calls: bool,
    batch: int,
    generator: torch.Generator,
) -> Iterator[list[Batch]]:
    """Endless draws, each a list of batches whose losses are averaged: from the pool and, in equal parts, the images.

    `calls`: an entry of the pool is a whole call.
    """
    tensors = {name: torch.from_numpy(value) for name, value in pool.items()}
    targets = tensors.pop("target")
    share = batch if images is None else -(-batch // 2)
    while True:
        chosen = torch.randint(len(targets), (1 if calls else share,), generator=generator)
        at = int(chosen) if calls else chosen
        drawn = [Batch({name: value[at] for name, value in tensors.items()}, targets[at], None)]
        if images is not None:
            inputs, wanted = images.draw(max(1, batch // 2), generator)
            with torch.no_grad():
                drawn.append(Batch(inputs, answer(teacher, inputs), wanted))
        yield drawn
