"""A bundle in the place of a diffusers transformer: `pipe.transformer = dit2deploy.load(path)`."""

import os

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.nn.engine_transformer import EngineTransformer
from dit2deploy.targets import runnable


def load(bundle: str | os.PathLike, target: str = "ort-cpu", threads: int | None = None) -> "EngineTransformer":
    """Opens the engine of a bundle; what comes back is called as the diffusers transformer that it was made from.

    `threads` None: all cores. Raises Misuse for a bundle that is broken or was changed, and for a target that is not in
    it or cannot run here.
    """
    opened = Bundle.load(bundle)
    opened.target(target)
    chosen = runnable(target)
    return EngineTransformer(opened, chosen.open(opened, threads=threads))
