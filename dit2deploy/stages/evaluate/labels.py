"""Class-conditional models in pixel space: what a classifier reads in the images, and their distance to real ones."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit2deploy.artefacts.bundle import QUALITY, Bundle
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_file
from dit2deploy.evaluate.generate import Call, Sampler
from dit2deploy.evaluate.quality import Classifier
from dit2deploy.nn import at_hand
from dit2deploy.targets import runnable

_BATCH = 50
_NOTE = (
    "FD is the Fréchet distance to real digits in this classifier's features, in squared feature units: no FID, and "
    "comparable only between sets of equal size."
)


def evaluate(
    bundle: Path,
    *,
    classifier: Path,
    samples: int = 200,
    steps: int = 20,
    guidance: float = 1.5,
    seed: int = 0,
    target: str = "ort-cpu",
) -> dict[str, Any]:
    """Draws `samples` images, labels in turn, and writes quality.json: the share that the classifier reads as the label
    they were asked for, and their Fréchet distance (FD); beside it the same of full precision, where torch and the
    model are at hand.

    Both draw from the same seeds, in turns. Raises Misuse for a model that is not class-conditional in pixel space, and
    for a target that is not in the bundle or cannot run here.
    """
    if samples < 2:
        raise Misuse(f"evaluate: {samples} samples are too few.", "Draw at least 2.")
    opened = Bundle.load(Path(bundle))
    opened.target(target)
    sampler, judge = Sampler.of(opened), Classifier.load(Path(classifier))
    chosen = runnable(target)
    settings = {"steps": steps, "guidance": guidance, "seed": seed}
    engine, output = chosen.open(opened), opened.manifest.outputs[0].name
    calls: dict[str, Call] = {"engine": lambda inputs: engine.run(inputs)[output]}
    reason = at_hand.why_no_full_precision(opened)
    if not reason:
        calls["full_precision"] = at_hand.full_precision(opened)
    try:
        drawn, took = _draw(sampler, calls, samples, **settings)
    finally:
        engine.close()
    found = {
        name: {
            "class_accuracy": judge.class_accuracy(images, np.arange(samples) % sampler.classes),
            "frechet_distance": judge.distance_to_real(images),
            "seconds": took[name],
        }
        for name, images in drawn.items()
    }
    return write_results(
        opened.folder / QUALITY,
        "quality",
        {
            "target": target,
            "samples": samples,
            **settings,
            "classifier_sha256": sha256_of_file(Path(classifier)),
            "note": _NOTE,
            "full_precision": {"reason": reason},
            **found,
        },
    )


def summary(result: Mapping[str, Any]) -> str:
    """Accuracy and FD of the engine and of full precision, a line each."""
    lines = [f"{result['samples']} samples, {result['steps']} steps, guidance {result['guidance']:g}"]
    for name, title in (("engine", "engine"), ("full_precision", "full precision")):
        found = result[name]
        lines.append(
            f"  {title:<15}not measured: {found['reason']}"
            if "reason" in found
            else f"  {title:<15}class accuracy {found['class_accuracy']:.1%}, FD {found['frechet_distance']:.2f}"
        )
    return "\n".join(lines)


def _draw(
    sampler: Sampler, calls: Mapping[str, Call], samples: int, *, steps: int, guidance: float, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Images by who drew, as many each, and the seconds that each took."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in calls}
    took = dict.fromkeys(calls, 0.0)
    for at in range(0, samples, _BATCH):
        indices = range(at, min(at + _BATCH, samples))
        for name, call in calls.items():
            begin = time.monotonic()
            parts[name].append(
                sampler.draw(
                    call,
                    labels=[index % sampler.classes for index in indices],
                    seeds=[seed + index for index in indices],
                    steps=steps,
                    guidance=guidance,
                    what=f"{name.replace('_', ' ')} samples {indices.start}..{indices.stop - 1}",
                )
            )
            took[name] += time.monotonic() - begin
    return {name: np.concatenate(images) for name, images in parts.items()}, took
