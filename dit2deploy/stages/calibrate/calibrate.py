"""Stage calibrate: records what the full-precision transformer is asked on the way from noise to image."""

import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dit2deploy.artefacts import unfinished
from dit2deploy.artefacts.calibration_set import MANIFEST, CalibrationManifest, CalibrationSet
from dit2deploy.base.command import command
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import TensorFile, sha256_of_json, write_tensors
from dit2deploy.base.machine import versions
from dit2deploy.base.memory import require
from dit2deploy.base.progress import note, report
from dit2deploy.models import Family
from dit2deploy.models.cost import cost_of_call
from dit2deploy.models.load import ModelFolder, load_transformer, open_model, skeleton
from dit2deploy.models.pipeline import read_prompts
from dit2deploy.models.stream import largest_layer
from dit2deploy.nn.call import call_numpy
from dit2deploy.sampling import Scheduler, initial_noise, is_guided, trajectory
from dit2deploy.stages.calibrate.prompts import denoise

FIRST_SEED = 1 << 20  # noise of seed 0 is this one's: calibration shares no noise with the samples of small seeds
_TOLD = {"command", "versions"}  # of the manifest: not what the set is made of
NO_TRAJECTORY = "none: independent random latents and conditioning at evenly spaced timesteps"


def calibrate(
    model: Path,
    out: Path,
    *,
    samples: int = 8,
    steps: int = 20,
    guidance: float = 1.5,
    max_memory: int | None = None,
    seed: int = 0,
    prompts: Path | None = None,
    height: int | None = None,
    width: int | None = None,
) -> CalibrationSet:
    """Writes the calibration set of a model (a diffusers folder) to the folder `out`: every call of its transformer.

    Class-conditional models denoise `samples` latents of balanced labels in `steps` DDIM steps with classifier-free
    guidance (the batch is then doubled, as the pipeline does it); noise comes from seeds that follow from `seed`.
    Of other families, `prompts` (a file, a prompt a line) are drawn by the model's own pipeline, which must be whole,
    in images of `height` x `width` pixels (None: its own size): outputs of the text encoders and latents are recorded
    as the transformer is given them. Without prompts their calls hold random latents and conditioning at evenly spaced
    timesteps, and the manifest's scheduler says so. A set in `out` that was made of the same weights with the same
    options is kept. Finished steps lie in `OUT.parts/` until the set is whole, so a killed run goes on. Of the weights,
    as much as fits stays in memory (`max_memory`: bytes that the process may own; None: what the machine has free).

    The pipeline of prompts is in memory as a whole.

    Raises Misuse for a class-conditional model without a scheduler or with prompts, for a pipeline that prompts cannot
    be given to, for a family whose inputs are unknown, and for a ceiling of memory that cannot be kept.
    """
    model, out = Path(model), Path(out)
    if samples < 1 or steps < 1:
        raise Misuse(f"calibrate: {samples} samples in {steps} steps make no set.", "Give at least 1 of each.")
    source = open_model(model)
    texts = () if prompts is None else read_prompts(Path(prompts))
    if texts and source.family.conditioning == "class":
        raise Misuse(f"{source.class_name}: is asked by classes, not by prompts.", "Leave the prompts out.")
    samples = len(texts) or samples
    seeds = tuple(FIRST_SEED + seed * samples + index for index in range(samples))
    scheduler = _scheduler(source, model)
    evenly = np.linspace(999, 0, steps).round().astype(int)
    timesteps = evenly if scheduler is None else scheduler.timesteps(steps)
    manifest = CalibrationManifest(
        model=source.class_name,
        model_sha256=source.sha256,
        scheduler=source.scheduler_config or {} if scheduler or texts else {"_class_name": NO_TRAJECTORY},
        steps=steps,
        guidance=guidance if scheduler or texts else 1.0,
        seeds=seeds,
        timesteps=tuple(timesteps.tolist()),
        prompts=texts,
        size=(height, width),
        command=command(),
        versions=versions("dit2deploy", "torch", "diffusers", "numpy"),
    )
    if (present := _present(out, manifest)) is not None:
        note(f"calibrate: {out} already holds this set")
        return present

    if texts:
        require_pipeline(model, max_memory)
        sampler = {"steps": steps, "guidance": guidance, "seed": seeds[0]}
        calls, timesteps = denoise(model, source.family, texts, **sampler, height=height, width=width)
        manifest = manifest.model_copy(update={"timesteps": timesteps})
        return _saved(out, manifest, calls)
    empty = skeleton(source)
    if scheduler is None:
        note(
            f"calibrate: warning: without prompts, {source.class_name} is calibrated on random noise in place of texts "
            "and trajectories. Give --prompts FILE (a prompt a line) and the folder of the whole pipeline."
        )
        return _saved(out, manifest, list(_random(source, empty, manifest)))
    _, keep = weights_in_memory(empty, source, samples=samples, guidance=guidance, max_memory=max_memory)
    network, _ = load_transformer(model, keep=keep)
    finished = _Finished(out.with_name(f"{out.name}.parts"), manifest)
    made = _saved(out, manifest, list(_denoise(network, source.family, manifest, scheduler, finished)))
    finished.remove()
    return made


def _saved(out: Path, manifest: CalibrationManifest, calls: Sequence[dict[str, np.ndarray]]) -> CalibrationSet:
    CalibrationSet.save(out, manifest, {name: np.stack([call[name] for call in calls]) for name in calls[0]})
    return CalibrationSet.load(out)


def weights_in_memory(
    empty: torch.nn.Module, source: ModelFolder, *, samples: int, guidance: float, max_memory: int | None
) -> tuple[int, int]:
    """Bytes that a call takes beside the weights that stay in memory, and bytes of these; Misuse where not even one
    layer and the activations fit."""
    inputs = source.family.inputs(empty.config, batch=2 * samples if is_guided(guidance) else samples, seed=0)
    least = largest_layer(empty) + cost_of_call(empty, inputs).activations
    keep = require(
        f"calibrate: {samples} samples",
        least,
        max_memory,
        cure="Give a higher `--max-memory` or fewer `--samples`: their activations are all in memory.",
    )
    return least, keep


class _Finished:
    """Outputs of finished steps on disk, under a key of what they were made of."""

    def __init__(self, folder: Path, manifest: CalibrationManifest) -> None:
        self._folder = folder
        self._key = sha256_of_json(manifest.model_dump(mode="json", exclude=_TOLD))
        self._steps = manifest.steps

    def output(self, index: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Of this step: from an earlier run, or made and kept."""
        path = self._folder / f"{self._key}.{index}.safetensors"
        if path.exists():
            return TensorFile(path, cure=f"Remove {self._folder} and run again.").read("output")
        value = make()
        write_tensors(path, {"output": value})
        unfinished.tell(self._folder, "calibrate", "steps", done=index + 1, total=self._steps)
        return value

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def require_pipeline(model: Path, max_memory: int | None) -> int:
    """Bytes of a whole pipeline in float32; Misuse where they do not fit."""
    files = [TensorFile(path) for path in sorted(model.rglob("*.safetensors"))]
    whole = sum(4 * math.prod(file.shape(name)) for file in files for name in file)
    require(f"calibrate: {model}, whole and in float32 as prompts need it,", whole, max_memory)
    return whole


def has_trajectories(source: ModelFolder, model: Path) -> bool:
    """Whether the set is made by denoising; raises as `calibrate` does."""
    return _scheduler(source, model) is not None


def _scheduler(source: ModelFolder, model: Path) -> Scheduler | None:
    """The scheduler of a class-conditional model; None for other families."""
    if source.family.conditioning != "class":
        return None
    if source.scheduler_config is None:
        raise Misuse(f"{model}: has no scheduler.", "Give the folder of the pipeline, not of its transformer alone.")
    return Scheduler.from_config(source.scheduler_config)


def _present(out: Path, wanted: CalibrationManifest) -> CalibrationSet | None:
    """The set in `out`, where it can be read and is the one that is wanted: command and versions may differ."""
    if not (out / MANIFEST).exists():
        return None
    try:
        found = CalibrationSet.load(out)
    except Misuse:
        note(f"calibrate: the set in {out} cannot be read and is made anew")
        return None
    told = _TOLD | ({"timesteps"} if wanted.prompts else set())  # those of a pipeline follow from the rest
    return found if found.manifest.model_dump(exclude=told) == wanted.model_dump(exclude=told) else None


def _denoise(
    network: torch.nn.Module,
    family: Family,
    manifest: CalibrationManifest,
    scheduler: Scheduler,
    finished: _Finished,
) -> Iterator[dict[str, np.ndarray]]:
    classes, shape = family.classes_and_shape(network.config)
    samples = len(manifest.seeds)
    calls: list[dict[str, np.ndarray]] = []
    steps_begun = itertools.count()

    def denoise(latents: np.ndarray, timesteps: np.ndarray, labels: np.ndarray) -> np.ndarray:
        call = {"hidden_states": latents, "timestep": timesteps, "class_labels": labels}
        calls.append(call)
        return finished.output(next(steps_begun), lambda: call_numpy(network, call))

    steps = trajectory(
        denoise,
        scheduler=scheduler,
        labels=np.arange(samples) * classes // samples if samples < classes else np.arange(samples) % classes,
        steps=manifest.steps,
        guidance=manifest.guidance,
        noise=initial_noise(manifest.seeds, shape),
        null_label=classes,
    )
    report("calibrate", 0, manifest.steps)
    for step in steps:
        report("calibrate", step.index + 1, manifest.steps)
        if not np.isfinite(step.output).all():
            raise Misuse(
                f"{manifest.model}: its output is not finite at timestep {step.timestep}.",
                "Look for NaN or inf in the model's weights.",
            )
        yield calls.pop()


def _random(
    source: ModelFolder, network: torch.nn.Module, manifest: CalibrationManifest
) -> Iterator[dict[str, np.ndarray]]:
    scale = source.family.timestep_scale
    for index, timestep in enumerate(manifest.timesteps):
        inputs = source.family.inputs(network.config, batch=len(manifest.seeds), seed=manifest.seeds[0] + index)
        inputs["timestep"] = torch.full_like(inputs["timestep"], timestep / scale)
        yield {name: value.numpy() for name, value in inputs.items()}
