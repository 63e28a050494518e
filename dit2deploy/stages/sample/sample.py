"""Stage sample: images by the engine of a bundle, without torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate.generate import Sampler
from dit2deploy.evaluate.images import grid, write_png
from dit2deploy.targets import runnable


def sample(
    bundle: Path,
    out: Path,
    *,
    labels: Sequence[int],
    steps: int = 20,
    guidance: float = 1.5,
    seed: int = 0,
    target: str = "ort-cpu",
    threads: int | None = None,
) -> np.ndarray:
    """Draws one image for each of `labels` and writes them to `out`, a PNG with one row a label.

    Image i comes from seed `seed + i` by DDIM with classifier-free guidance (1 or less: none), so it does not depend
    on the images beside it. Gives float32 [N, C, H, W] in -1..1 in the order of `labels`. Raises Misuse for a model
    that needs a VAE or a text encoder, for unknown labels, and for a target that is not in the bundle or cannot run
    here.
    """
    if not labels:
        raise Misuse("sample: no label is given.", "Give at least one, e.g. --label 7.")
    opened = Bundle.load(Path(bundle))
    opened.target(target)
    sampler = Sampler.of(opened)
    chosen = runnable(target)
    engine, output = chosen.open(opened, threads=threads), opened.manifest.outputs[0].name
    try:
        images = sampler.draw(
            lambda inputs: engine.run(inputs)[output],
            labels=labels,
            seeds=range(seed, seed + len(labels)),
            steps=steps,
            guidance=guidance,
        )
    finally:
        engine.close()
    rows: dict[int, list[np.ndarray]] = {}
    for label, image in zip(labels, images, strict=True):
        rows.setdefault(label, []).append(image)
    write_png(Path(out), grid([np.stack(row) for row in rows.values()], captions=[str(label) for label in rows]))
    return images
