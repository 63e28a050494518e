"""Calls of a text-conditional transformer as its own pipeline makes them: real text embeddings, real trajectories."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dit2deploy.artefacts.timesteps import whole as whole_timestep
from dit2deploy.base.errors import Misuse
from dit2deploy.models import Family
from dit2deploy.models.pipeline import BATCH, batches, open_pipeline, recording


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

    The full-precision pipeline runs in float32, a few prompts at a time; given back are the calls of all prompts as one
    batch. Raises Misuse for a folder that is no whole pipeline, where a call's output is not finite, and where texts of
    the batches have other lengths.
    """
    pipe = open_pipeline(model)
    sampler = {"seed": seed, "steps": steps, "guidance": guidance}
    parts, counts = [], []
    with recording(pipe.transformer, family) as seen:
        for drawn in batches(pipe, prompts, what="calibrate: prompts", **sampler, height=height, width=width):
            if not np.isfinite(drawn).all() or not all(np.isfinite(call["hidden_states"]).all() for call in seen):
                raise Misuse(f"{model}: its output is not finite.", "Look for NaN or inf in the pipeline's weights.")
            parts.append(list(seen))
            counts.append(len(drawn))
            seen.clear()
    batched = family.batch_axes(pipe.transformer.config)
    calls = [_joined(same, batched, counts) for same in zip(*parts, strict=True)]
    return calls, tuple(whole_timestep(float(call["timestep"].max()) * family.timestep_scale) for call in calls)


def _joined(
    calls: Sequence[dict[str, np.ndarray]], batched: Mapping[str, int], counts: Sequence[int]
) -> dict[str, np.ndarray]:
    """One call of all prompts of the same call of each batch, of `counts` prompts. `batched`: the inputs' batch axes.

    Guided pipelines ask twice for each prompt of a batch, [without, with] or the other way around: so does the result.
    """
    joined = {}
    for name, first in calls[0].items():
        axis = batched.get(name)
        if axis is None:
            joined[name] = first
            continue
        split = [
            call[name].reshape(*first.shape[:axis], -1, count, *call[name].shape[axis + 1 :])
            for call, count in zip(calls, counts, strict=True)
        ]
        if len({(*part.shape[: axis + 1], *part.shape[axis + 2 :]) for part in split}) > 1:
            raise Misuse(
                f"calibrate: the pipeline makes {name} of another length for each {BATCH} prompts.",
                f"Give at most {BATCH} prompts, or prompts of one length.",
            )
        whole = np.concatenate(split, axis + 1)
        joined[name] = whole.reshape(*first.shape[:axis], -1, *first.shape[axis + 1 :])
    return joined
