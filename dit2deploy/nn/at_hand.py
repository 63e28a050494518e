"""The PyTorch models that a bundle was made from, where they still are; importing this file needs no torch."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.artefacts.checkpoint import Checkpoint

# One call of a transformer: keyword arguments as arrays -> its output.
Call = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def why_no_full_precision(bundle: Bundle) -> str:
    """Why the full-precision model cannot be had here; "" where it can. Loads nothing."""
    folder = bundle.manifest.provenance.get("model_path", "")
    if not importlib.util.find_spec("torch"):
        return "torch is not installed"
    if not folder or not Path(folder).is_dir():
        return f"the full-precision model{f' {folder}' if folder else ''} is not on this machine"
    from dit2deploy.models.load import open_model

    expected = bundle.manifest.provenance.get("model_sha256")
    if expected is not None and open_model(Path(folder)).sha256 != expected:
        return f"{folder} was changed since the bundle was built"
    return ""


def full_precision(bundle: Bundle) -> Call:
    """The full-precision model in PyTorch, float32; only where `why_no_full_precision` has nothing to say."""
    from dit2deploy.models.load import load_transformer
    from dit2deploy.nn.call import call_numpy

    module = load_transformer(Path(bundle.manifest.provenance["model_path"]))[0]
    return lambda inputs: call_numpy(module, inputs)


def why_no_quantized(bundle: Bundle) -> str:
    """Why the quantized PyTorch model cannot be had here; "" where it can. Loads nothing."""
    folder = bundle.manifest.provenance.get("checkpoint", "")
    if not importlib.util.find_spec("torch"):
        return "torch is not installed"
    if not folder or not Path(folder).is_dir():
        return f"the checkpoint{f' {folder}' if folder else ''} is not on this machine"
    if Checkpoint.load(Path(folder)).sha256 != bundle.manifest.provenance.get("checkpoint_sha256"):
        return f"{folder} was changed since the bundle was built"
    return ""


def quantized(bundle: Bundle) -> Call:
    """The quantized model in PyTorch; only where `why_no_quantized` has nothing to say."""
    from dit2deploy.nn.call import call_numpy
    from dit2deploy.nn.convert import load_quantized

    module = load_quantized(Checkpoint.load(Path(bundle.manifest.provenance["checkpoint"])))
    return lambda inputs: call_numpy(module, inputs)
