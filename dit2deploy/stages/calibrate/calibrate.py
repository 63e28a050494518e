"""Stage calibrate: records what the full-precision transformer is asked on the way from noise to image."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import MANIFEST, CalibrationManifest, CalibrationSet
from dit2deploy.base.errors import Misuse
from dit2deploy.base.machine import versions
from dit2deploy.base.progress import note, report
from dit2deploy.models import Family
from dit2deploy.models.load import ModelFolder, load_transformer, open_model
from dit2deploy.models.pipeline import read_prompts
from dit2deploy.sampling import Scheduler, initial_noise, trajectory
from dit2deploy.stages.calibrate.prompts import denoise

FIRST_SEED = 1 << 20  # noise of seed 0 is this one's: calibration shares no noise with the samples of small seeds
NO_TRAJECTORY = "none: independent random latents and conditioning at evenly spaced timesteps"


def calibrate(
    model: Path,
    out: Path,
    *,
    samples: int = 8,
    steps: int = 20,
    guidance: float = 1.5,
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
    options is kept.

    Raises Misuse for a class-conditional model without a scheduler or with prompts, for a pipeline that prompts cannot
    be given to, and for a family whose inputs are unknown.
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
        command=f"dit2deploy calibrate {model} --out {out} --samples {samples} --steps {steps} "
        f"--guidance {guidance} --seed {seed}" + (f" --prompts {prompts}" if texts else ""),
        versions=versions("dit2deploy", "torch", "diffusers", "numpy"),
    )
    if (present := _present(out, manifest)) is not None:
        note(f"calibrate: {out} already holds this set")
        return present

    if texts:
        sampler = {"steps": steps, "guidance": guidance, "seed": seeds[0]}
        calls, timesteps = denoise(model, source.family, texts, **sampler, height=height, width=width)
        manifest = manifest.model_copy(update={"timesteps": timesteps})
        return _saved(out, manifest, calls)
    network, _ = load_transformer(model)
    if scheduler is not None:
        calls = list(_denoise(network, source.family, manifest, scheduler))
    else:
        note(f"calibrate: {source.class_name} has no trajectories here; its set holds random inputs")
        calls = list(_random(source, network, manifest))
    return _saved(out, manifest, calls)


def _saved(out: Path, manifest: CalibrationManifest, calls: list[dict[str, np.ndarray]]) -> CalibrationSet:
    CalibrationSet.save(out, manifest, {name: np.stack([call[name] for call in calls]) for name in calls[0]})
    return CalibrationSet.load(out)


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
    told = {
        "command",
        "versions",
        *({"timesteps"} if wanted.prompts else ()),
    }  # those of a pipeline follow from the rest
    return found if found.manifest.model_dump(exclude=told) == wanted.model_dump(exclude=told) else None


def _denoise(
    network: torch.nn.Module, family: Family, manifest: CalibrationManifest, scheduler: Scheduler
) -> Iterator[dict[str, np.ndarray]]:
    classes, shape = family.classes_and_shape(network.config)
    samples = len(manifest.seeds)
    calls: list[dict[str, np.ndarray]] = []

    def denoise(latents: np.ndarray, timesteps: np.ndarray, labels: np.ndarray) -> np.ndarray:
        call = {"hidden_states": latents, "timestep": timesteps, "class_labels": labels}
        calls.append(call)
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(value) for name, value in call.items()}
            return network(**tensors, return_dict=False)[0].numpy()

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
