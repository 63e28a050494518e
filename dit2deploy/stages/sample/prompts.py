"""Images and clips of prompts by a pipeline with the engine in it, beside full precision from the same seeds."""

from pathlib import Path
from typing import Any

import numpy as np

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import whole_file
from dit2deploy.evaluate.images import grid, write_png
from dit2deploy.targets import runnable

FRAMES = 4  # of a clip in the picture: the first, the last, and what lies evenly between
_PER_SECOND = 16  # Wan2.1's


def sample_prompts(
    bundle: Path,
    out: Path,
    *,
    prompts: Path,
    model: Path | None = None,
    steps: int = 20,
    guidance: float = 1.5,
    seed: int = 0,
    target: str = "ort-cpu",
    threads: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> dict[str, np.ndarray]:
    """Draws each prompt of a file twice from one seed, in full precision and with the engine, and writes `out`, a PNG
    with a row a prompt: full precision | engine. Of videos it shows a few frames, and a clip of the same name (.webp)
    plays both side by side.

    `model` is the folder of the whole pipeline (None: where the bundle says that its model was). Prompt i has the seed
    `seed + i`. Gives "full_precision" and "engine": float32 [N, H, W, 3] or, of videos, [N, F, H, W, 3], in 0 .. 1.
    Raises Misuse for a folder that is no whole pipeline of this model, and for a target that cannot run here.
    """
    opened = Bundle.load(Path(bundle))
    opened.target(target)
    chosen = runnable(target)
    from dit2deploy.models.pipeline import read_prompts
    from dit2deploy.nn.drawn import draw_both

    texts = read_prompts(Path(prompts))
    settings: dict[str, Any] = {"seed": seed, "steps": steps, "guidance": guidance}
    settings |= {"height": height, "width": width, "num_frames": frames}
    drawn = draw_both(opened, texts, model=model, engine=lambda: chosen.open(opened, threads=threads), **settings)
    _write(Path(out), drawn, count=len(texts))
    return drawn


def _write(out: Path, drawn: dict[str, np.ndarray], *, count: int) -> None:
    """The picture and, of videos, the clip."""
    rows = [np.concatenate([tiles(images[index : index + 1]) for images in drawn.values()]) for index in range(count)]
    write_png(out, grid(rows, captions=[str(index) for index in range(count)]))
    if drawn["engine"].ndim == 5:
        write_clip(out.with_suffix(".webp"), np.concatenate(list(drawn.values()), axis=3))


def tiles(drawn: np.ndarray) -> np.ndarray:
    """float32 [N, 3, H, W] in -1 .. 1 of images [N, H, W, 3] in 0 .. 1, or of FRAMES frames of each video."""
    if drawn.ndim == 5:
        count = drawn.shape[1]
        places = sorted({round(place) for place in np.linspace(0, count - 1, min(FRAMES, count))})
        drawn = drawn[:, places].reshape(-1, *drawn.shape[2:])
    return drawn.transpose(0, 3, 1, 2).astype(np.float32) * 2 - 1


def write_clip(path: Path, videos: np.ndarray) -> None:
    """Writes videos [N, F, H, W, 3] in 0 .. 1, one below the other, as a lossless animated WebP that repeats.

    Raises Misuse where Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise Misuse("a clip is written by Pillow, which is not installed.", "pip install pillow") from None
    n, frames, height, width, _ = videos.shape
    stacked = videos.transpose(1, 0, 2, 3, 4).reshape(frames, n * height, width, 3)
    pictures = [Image.fromarray(frame) for frame in np.rint(np.clip(stacked, 0, 1) * 255).astype(np.uint8)]
    with whole_file(path) as temporary:
        pictures[0].save(
            temporary,
            "WEBP",
            save_all=True,
            append_images=pictures[1:],
            duration=1000 // _PER_SECOND,
            loop=0,
            lossless=True,
        )
