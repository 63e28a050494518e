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


def of_calls(told: Sequence[int], recorded: np.ndarray) -> tuple[int, ...] | None:
    """`whole` of the timesteps [C] that calls were recorded with, in the model's unit: training steps, or thousandths.

    `told` are those that the set tells, which decide about the unit: the same, or, of older sets, the nearest integers,
    which may be in the next timestep group. None where they are neither.
    """
    for scale in (1.0, 1000.0):
        exact = np.asarray(recorded, np.float64) * scale
        found = tuple(whole(float(timestep)) for timestep in exact)
        if all(one in (right, round(t)) for one, right, t in zip(told, found, exact.tolist(), strict=True)):
            return found
    return None
