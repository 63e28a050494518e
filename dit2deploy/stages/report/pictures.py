"""Sample grids of the report: the same seeds by full precision, by the quantized model and by the engine."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate.generate import Call, Sampler
from dit2deploy.evaluate.images import grid, png
from dit2deploy.nn import at_hand
from dit2deploy.targets import runnable

COLUMNS = 10


@dataclass(frozen=True)
class Strip:
    """Images of one source as a PNG data URI; `reason` where there are none."""

    title: str
    uri: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Pictures:
    strips: tuple[Strip, ...]
    labels: tuple[int, ...] = ()
    caption: str = ""
    reason: str = ""


def draw(
    bundle: Bundle,
    samples: Mapping[str, np.ndarray] | None,
    *,
    target: str,
    steps: int,
    guidance: float,
    seed: int,
) -> Pictures:
    """Shows images that are given; draws them otherwise, that of column c from seed + c."""
    if samples is not None:
        return Pictures(tuple(Strip(title, _uri(images)) for title, images in samples.items()))
    try:
        sampler = Sampler.of(bundle)
    except Misuse as error:
        return Pictures((), reason=f"{error.cause} {error.cure}")
    labels = sorted({int(label) for label in np.linspace(0, sampler.classes - 1, COLUMNS)})

    def strip(title: str, reason: str, load: Callable[[Bundle], Call]) -> Strip:
        if reason:
            return Strip(title, reason=reason)
        images = sampler.draw(
            load(bundle),
            labels=labels,
            seeds=range(seed, seed + len(labels)),
            steps=steps,
            guidance=guidance,
            what=f"samples for the report, {title}",
        )
        return Strip(title, _uri(images, columns=len(labels)))

    return Pictures(
        (
            strip("Full precision", at_hand.why_no_full_precision(bundle), at_hand.full_precision),
            strip("Quantized, PyTorch", at_hand.why_no_quantized(bundle), at_hand.quantized),
            strip(f"Engine, {target}", _why_no_engine(bundle, target), lambda bundle: _engine(bundle, target)),
        ),
        tuple(labels),
        f"{steps} DDIM steps, guidance {guidance:g}. Each column is one label, from the same noise in all rows "
        f"(seeds {seed} to {seed + len(labels) - 1}).",
    )


def _uri(images: np.ndarray, *, columns: int = COLUMNS) -> str:
    rows = [images[at : at + columns] for at in range(0, len(images), columns)]
    return f"data:image/png;base64,{base64.b64encode(png(grid(rows))).decode()}"


def _why_no_engine(bundle: Bundle, target: str) -> str:
    if target not in bundle.manifest.targets:
        return f"the bundle has no engine for {target}"
    try:
        runnable(target)
    except Misuse as error:
        return error.cause
    return ""


def _engine(bundle: Bundle, target: str) -> Call:
    engine, output = runnable(target).open(bundle), bundle.manifest.outputs[0].name
    return lambda inputs: engine.run(inputs)[output]
