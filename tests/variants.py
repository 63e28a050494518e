"""Copies of a saved pipeline with some weights replaced."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dit2deploy.base.files import TensorFile, write_tensors


def with_weights(model: Path, folder: Path, changes: Mapping[str, np.ndarray]) -> Path:
    """Copies the pipeline `model` to `folder`, replaces the tensors named, and returns `folder`."""
    shutil.copytree(model, folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file = TensorFile(path)
    write_tensors(path, {name: changes[name] if name in changes else file.read(name) for name in file})
    return folder
