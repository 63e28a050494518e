"""Activation widths that change with the timestep (TQ-DiT, AdaTSQ): which group each sample of a call is in."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.timesteps import MARGIN
from dit2deploy.base.errors import Misuse


class TimestepGroups:
    """Held by all quantized layers of a model; the model's forward hooks set it for the length of one call.

    Group i holds timesteps t in 0 .. training steps with t < bounds[i] that are in no group before it. t is `scale`
    times the argument `timestep` (FLUX passes 0 .. 1).
    """

    def __init__(self, bounds: Sequence[int], scale: float) -> None:
        self.bounds = tuple(bounds)
        self.scale = scale
        self._index: torch.Tensor | None = None

    def qmax(self, stored: torch.Tensor) -> torch.Tensor:
        """float32 [T, ..], a table of the groups, to [B, ..], that of each sample of the call; with one group it stays
        as it is."""
        if len(self.bounds) == 1:
            return stored
        if self._index is None:
            raise RuntimeError("timestep groups: a layer was called outside of its transformer's forward")
        return stored[self._index]

    @property
    def index(self) -> torch.Tensor | None:
        """The group of each sample, int64 [B], within a call; to be set where a part of the transformer is called."""
        return self._index

    @index.setter
    def index(self, value: torch.Tensor | None) -> None:
        self._index = value

    def attach(self, transformer: torch.nn.Module) -> None:
        """Hooks the transformer's forward, which must be given `timestep` by keyword."""
        if len(self.bounds) > 1:
            transformer.register_forward_pre_hook(self._enter, with_kwargs=True)
            transformer.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        t = kwargs["timestep"]
        # One timestep a token (Wan 2.2): the sample's own is the largest, tokens that are given have 0.
        t = (t.flatten(1).amax(1) if t.ndim > 1 else t.reshape(-1)).float() * self.scale
        # A sum of comparisons: exportable, and equal to artefacts/timesteps.py's searchsorted.
        self._index = sum((t > bound - MARGIN).long() for bound in self.bounds[:-1])

    def _leave(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self._index = None


def runs_of(calibration: CalibrationSet, groups: int) -> list[list[int]]:
    """The steps of each time group, in the sampler's order (the noisiest first): runs of as equal length as can be.

    Raises Misuse where the calibration set has fewer steps than groups.
    """
    steps = len(calibration)
    if groups > steps:
        raise Misuse(
            f"{calibration.folder}: holds {steps} steps, too few for {groups} timestep groups.",
            f"Calibrate with more steps, or search with {steps} groups or fewer.",
        )
    return [run.tolist() for run in np.array_split(np.arange(steps), groups)]


def bounds_of(calibration: CalibrationSet, runs: Sequence[Sequence[int]], training_steps: int) -> tuple[int, ...]:
    """The timestep_bounds of a policy, rising, whose groups hold these runs: halfway between neighbouring steps."""
    timesteps = calibration.manifest.timesteps
    between = [(timesteps[earlier[-1]] + timesteps[later[0]] + 1) // 2 for earlier, later in pairwise(runs)]
    return (*reversed(between), training_steps)
