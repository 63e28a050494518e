"""A few trajectories of a calibration set, walked anew from their noise by a network in any state; latent errors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.base.errors import Misuse
from dit2deploy.nn.simulate import Simulation
from dit2deploy.sampling import Scheduler, guided_output, is_guided
from dit2deploy.stages.search.measure import DIGITS, LARGEST, TINY

if TYPE_CHECKING:
    from dit2deploy.models.load import ModelFolder


class Walk:
    """`start` float32 [S, C, H, W] is the recorded noise of `samples`, indices of the calibration set's seeds."""

    def __init__(self, network: Simulation, calibration: CalibrationSet, *, samples: Sequence[int]) -> None:
        manifest = calibration.manifest
        self._network = network
        self._steps, self._guidance = manifest.steps, manifest.guidance
        self._scheduler = Scheduler.from_config(manifest.scheduler)
        self._timesteps = manifest.timesteps
        first = calibration.call(0)
        guided, held = is_guided(manifest.guidance), len(manifest.seeds)
        kept = np.asarray(samples)
        self.start = first["hidden_states"][kept]
        rows = np.concatenate([kept, kept + held]) if guided else kept
        self._labels = torch.from_numpy(first["class_labels"][rows])

    def steps(self, latents: np.ndarray, run: Sequence[int]) -> np.ndarray:
        """The latents after the sampler steps `run` (indices), by the network as it is switched now."""
        for step in run:
            timestep, repeat = self._timesteps[step], len(self._labels) // len(latents)
            inputs = {
                "hidden_states": torch.from_numpy(np.concatenate([latents] * repeat)),
                "timestep": torch.full((len(self._labels),), timestep, dtype=torch.int64),
                "class_labels": self._labels,
            }
            output = self._network.call(inputs).numpy()[:, : latents.shape[1]]
            if repeat == 2:
                output = guided_output(output, self._guidance)
            latents = self._scheduler.step(output, timestep, latents, steps=self._steps)
        return latents


def latent_error(latents: np.ndarray, exact: np.ndarray) -> float:
    """The geometric mean over samples (their mean SQNR in dB) of |x - x_float|^2 / |x_float|^2, latents [S, ..].

    A mean of squares [inferred] follows whichever of a few samples turns into another picture.
    """
    exact = exact.astype(np.float64)
    axes = tuple(range(1, exact.ndim))
    ratio = ((latents - exact) ** 2).sum(axes) / np.maximum((exact**2).sum(axes), TINY)
    error = np.exp(np.mean(np.log(np.clip(np.nan_to_num(ratio, nan=LARGEST), TINY, LARGEST))))
    return float(f"{error:.{DIGITS}g}")


def samples_of(calibration: CalibrationSet, count: int) -> tuple[list[int], list[int]]:
    """`count` samples to search on, evenly spread, and up to twice as many others to judge what was found.

    On few samples, the best of many candidates owes part of its lead to chance.
    """
    held = len(calibration.manifest.seeds)
    count = min(count, held)
    searched = [index * held // count for index in range(count)]
    return searched, [index for index in range(held) if index not in searched][: 2 * count]


def check_walks(source: "ModelFolder", recipe: str) -> None:
    """Raises Misuse for a family whose trajectories cannot be walked here."""
    if source.family.conditioning != "class":
        raise Misuse(
            f"{recipe}: {source.class_name} has no trajectories here (no text encoder is at hand).",
            "Use the recipe treeq-tss or robuq-ampn.",
        )
