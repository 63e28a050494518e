"""What the metrics measure: images of both models in pairs; and how packages and weights are found, never fetched."""

import importlib
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
    """Images float32 [N, 3, H, W] in 0 .. 1 by who drew them, image i of `prompts[i]`; folders that metrics take."""

    engine: torch.Tensor
    full_precision: torch.Tensor
    prompts: tuple[str, ...]
    clip: Path | None = None
    real: Path | None = None

    @classmethod
    def of(
        cls, drawn: Mapping[str, np.ndarray], prompts: Sequence[str], *, clip: Path | None, real: Path | None
    ) -> "Pairs":
        """Of [N, H, W, 3], or of videos [N, F, H, W, 3]: each frame is an image."""
        frames = drawn["engine"].shape[1] if drawn["engine"].ndim == 5 else 1
        images = {
            name: torch.from_numpy(np.asarray(value, np.float32).reshape(-1, *value.shape[-3:]).transpose(0, 3, 1, 2))
            for name, value in drawn.items()
        }
        texts = tuple(prompt for prompt in prompts for _ in range(frames))
        return cls(images["engine"], images["full_precision"], texts, clip, real)


@dataclass(frozen=True)
class Metric:
    """`measure` gives "pair" (of engine to full precision) or one value each, "engine" and "full_precision"; it raises
    Misuse where a package or weights are missing."""

    name: str
    title: str
    better: Literal["higher", "lower"]
    measure: Callable[[Pairs], dict[str, Any]]


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
    if not path.is_file():
        raise Misuse(f"{path}: no such file.", f"Download {url} to it.")
    if not sha256_of_file(path).startswith(path.stem.rpartition("-")[2]):
        raise Misuse(f"{path}: is not the published file (its hash is another).", f"Download {url} again.")
    return path
