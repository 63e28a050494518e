"""What the metrics measure: images of both models in pairs; and how packages and weights are found, never fetched."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_file


@dataclass(frozen=True)
class Pairs:
    """Images float32 [N, 3, H, W] in 0 .. 1 by who drew them, image i of `prompts[i]`; what metrics take beside them.

    Of videos, `frames` images in a row are one. Evaluators that are programs of their own read the images as files from
    `samples`, and are run by the interpreter `python`.
    """

    engine: torch.Tensor
    full_precision: torch.Tensor
    prompts: tuple[str, ...]
    samples: Path
    frames: int = 1
    clip: Path | None = None
    real: Path | None = None
    geneval: Path | None = None
    python: Path = Path(sys.executable)

    @classmethod
    def of(
        cls, drawn: Mapping[str, np.ndarray], prompts: Sequence[str], *, samples: Path, **given: Path | None
    ) -> "Pairs":
        """Of [N, H, W, 3], or of videos [N, F, H, W, 3]: each frame is an image. Fields may be None."""
        frames = drawn["engine"].shape[1] if drawn["engine"].ndim == 5 else 1
        images = {
            name: torch.from_numpy(np.asarray(value, np.float32).reshape(-1, *value.shape[-3:]).transpose(0, 3, 1, 2))
            for name, value in drawn.items()
        }
        texts = tuple(prompt for prompt in prompts for _ in range(frames))
        fields: dict[str, Any] = {name: path for name, path in given.items() if path is not None}
        return cls(images["engine"], images["full_precision"], texts, samples, frames, **fields)

    def by_who(self) -> dict[str, np.ndarray]:
        """uint8 [N, H, W, 3] of both."""
        drawn = {"engine": self.engine, "full_precision": self.full_precision}
        return {who: whole_numbers(images).permute(0, 2, 3, 1).numpy() for who, images in drawn.items()}


def whole_numbers(images: torch.Tensor) -> torch.Tensor:
    """uint8 of images in 0 .. 1."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Metric:
    """`measure` gives "pair" (of engine to full precision) or one value each, "engine" and "full_precision"; it raises
    Misuse where a package or weights are missing. `of`: "images" means those that are no frames of a video."""

    name: str
    title: str
    better: Literal["higher", "lower"]
    measure: Callable[[Pairs], dict[str, Any]]
    of: Literal["all", "images", "videos"] = "all"


def package(name: str, install: str) -> ModuleType:
    """The module; Misuse where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # the last two: a torchvision of another torch
        reason = (str(error).splitlines() or [""])[0]
        raise Misuse(f"{name} cannot be imported: {reason}.", f"pip install {install}") from None


def hub_file(url: str) -> Path:
    """Where torch.hub keeps the weights of this address, so that a package finds them and fetches nothing; Misuse where
    they are not there, or not the published ones: their names end with the first digits of their sha256."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    return fetched(path, url, sha256=path.stem.rpartition("-")[2])


def fetched(path: Path, url: str, *, sha256: str = "") -> Path:
    """The path of what is published at this address; Misuse where it is not there, or where its sha256 does not begin
    with these digits."""
    if not path.is_file():
        raise Misuse(f"{path}: no such file.", f"Download {url} to it.")
    if sha256 and not sha256_of_file(path).startswith(sha256):
        raise Misuse(f"{path}: is not the published file (its hash is another).", f"Download {url} again.")
    return path
