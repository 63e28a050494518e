"""Images of prompts by a model's own pipeline, in full precision and with an engine in it, from the same seeds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.base.errors import Misuse
from dit2deploy.models.load import open_model
from dit2deploy.models.pipeline import open_pipeline, run
from dit2deploy.nn import at_hand
from dit2deploy.nn.engine_transformer import Engine, EngineTransformer


def draw_both(
    bundle: Bundle, prompts: Sequence[str], *, model: Path | None, engine: Callable[[], Engine], **settings: Any
) -> dict[str, np.ndarray]:
    """ "full_precision" and "engine": float32 [N, H, W, 3] or, of videos, [N, F, H, W, 3], in 0 .. 1.

    `model` is the folder of the whole pipeline (None: where the bundle says that its model was), `engine` opens the
    bundle's, `settings` are those of models.pipeline.run. Raises Misuse for a folder that is no whole pipeline of this
    model.
    """
    if model is None and (reason := at_hand.why_no_full_precision(bundle)):
        raise Misuse(f"{bundle.folder}: its pipeline is not at hand: {reason}.", "Give its folder (--model).")
    folder = Path(model or bundle.manifest.provenance["model_path"])
    expected = bundle.manifest.provenance.get("model_sha256")
    if expected is not None and open_model(folder).sha256 != expected:
        raise Misuse(f"{folder}: is not the model that {bundle.folder} was made from.", "Give that one.")
    pipe = open_pipeline(folder)
    drawn = {"full_precision": run(pipe, prompts, what="draw prompts in full precision", **settings)}
    pipe.transformer = EngineTransformer(bundle, engine())
    try:
        drawn["engine"] = run(pipe, prompts, what="draw prompts with the engine", **settings)
    finally:
        pipe.transformer.close()
    return drawn
