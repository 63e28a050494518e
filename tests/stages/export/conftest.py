"""Each family's tiny transformer, exported once a session in each form."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.models import FAMILIES, Family
from dit2deploy.models.load import load_transformer
from dit2deploy.models.pixart import PIXART
from dit2deploy.nn.convert import load_quantized
from dit2deploy.stages.export import export, export_float
from tests.packing import pack_checkpoint, policy_of, tiny_module
from tests.tracing import lower_once

BOUNDS = (500, 1000)


@dataclass(frozen=True)
class Exported:
    family: Family
    model: OnnxModel
    module: torch.nn.Module  # what the file must compute

    def call(self, *, batch: int, second: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs and PyTorch's output."""
        inputs = self.family.inputs(self.module.config, batch=batch, seed=7, second=second)
        with torch.no_grad():
            output = self.module(**inputs, return_dict=False)[0]
        return {name: value.numpy() for name, value in inputs.items()}, output.numpy()


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[[str, str], Exported]:
    """exported(family name, form); quantized: ternary with a low-rank branch, 4 and 8 bits in two timestep groups."""
    root: Path = tmp_path_factory.mktemp("exported")
    done: dict[tuple[str, str], Exported] = {}

    def get(name: str, form: str) -> Exported:
        if (name, form) not in done:
            family = next(family for family in FAMILIES if family.name == name)
            out = root / f"{name}-{form}"
            if form == "float":
                tiny_module(family).save_pretrained(root / name)
                model = export_float(root / name, out)
                module = load_transformer(root / name)[0]
            else:
                source = tiny_module(family)
                policy = policy_of(family, source, bits=(4, 8), bounds=BOUNDS, low_rank=4)
                checkpoint = pack_checkpoint(root / f"{name}-{form}-checkpoint", source, policy)
                model = export(checkpoint.folder, out, form=form)
                module = load_quantized(checkpoint)
            done[name, form] = Exported(family, model, module)
        return done[name, form]

    return get


@pytest.fixture(scope="session")
def pixart_sizes(tmp_path_factory) -> tuple[Checkpoint, OnnxModel]:
    """A checkpoint of PixArt, and its ONNX model of its own size (8x8) and of 12x4."""
    root, module = tmp_path_factory.mktemp("sizes"), tiny_module(PIXART)
    checkpoint = pack_checkpoint(root / "checkpoint", module, policy_of(PIXART, module, low_rank=4))
    return checkpoint, export(checkpoint.folder, root / "onnx", sizes=[(12, 4), (8, 8)])


@pytest.fixture(scope="session")
def _tiny_trace() -> list:
    return []


@pytest.fixture
def tiny_traced_once(monkeypatch, _tiny_trace):
    """For exports of tiny_checkpoint in tests that look at something else than the graph."""
    lower_once(monkeypatch, _tiny_trace)
