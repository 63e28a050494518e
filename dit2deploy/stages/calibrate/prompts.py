"""Calls of a text-conditional transformer as its own pipeline makes them: real text embeddings, real trajectories."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dit2deploy.artefacts.timesteps import whole
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import report
from dit2deploy.models import Family
from dit2deploy.models.pipeline import open_pipeline, recording, run


def denoise(
    model: Path,
    family: Family,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    height: int | None,
    width: int | None,
) -> tuple[list[dict[str, np.ndarray]], tuple[int, ...]]:
    """All calls of the pipeline's transformer while it draws the prompts, and the timestep of each in 0 .. 1000,
    a whole number in the timestep group of the one that it was.

    The full-precision pipeline runs in float32, all prompts as one batch. Raises Misuse for a folder that is no whole
    pipeline, and where a call's output is not finite.
    """
    pipe = open_pipeline(model)
    report("calibrate: prompts", 0, 1)
    with recording(pipe.transformer, family) as calls:
        drawn = run(pipe, prompts, seed=seed, steps=steps, guidance=guidance, height=height, width=width)
    report("calibrate: prompts", 1, 1)
    if not np.isfinite(drawn).all() or not all(np.isfinite(call["hidden_states"]).all() for call in calls):
        raise Misuse(f"{model}: its output is not finite.", "Look for NaN or inf in the pipeline's weights.")
    return calls, tuple(whole(float(call["timestep"].max()) * family.timestep_scale) for call in calls)
