"""Activation widths that change with the timestep (TQ-DiT, AdaTSQ): which group each sample of a call is in."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


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
        # A sum of comparisons: exportable, and equal to searchsorted. FLUX's products with 1000 may fall short of an
        # integer by a rounding, hence the margin.
        self._index = sum((t > bound - 0.01).long() for bound in self.bounds[:-1])

    def _leave(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self._index = None
