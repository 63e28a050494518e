"""Which of a policy's timestep groups a timestep is in: the same here, in calibration sets and at run time."""

from collections.abc import Sequence

import numpy as np

# FLUX passes t / 1000; the product with 1000 may fall short of an integer by a rounding of float32.
MARGIN = 0.01


def groups_of(timesteps: Sequence[float] | np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """int64, shaped like `timesteps` (0 .. training steps): the group of each, as nn/timestep_groups.py finds it.

    The last group has no end: flow matching starts at t = training steps, which is `bounds[-1]`.
    """
    return np.searchsorted(np.asarray(bounds[:-1]) - MARGIN, np.asarray(timesteps, np.float64), side="left")


def whole(timestep: float) -> int:
    """The integer that is in the same group as a timestep between two, whatever the bounds: the one below."""
    return int(np.floor(timestep + MARGIN))
