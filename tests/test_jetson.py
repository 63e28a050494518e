"""docs/jetson.md: the tool it names makes what it says, and the figures and options in it are that tool's."""

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.ops import DOMAIN, OPS
from dit2deploy.targets import kernel
from tests.bundles import sources

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "jetson.md").read_text()


def load():
    spec = importlib.util.spec_from_file_location("trtexec_onnx", ROOT / "tools" / "trtexec_onnx.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["trtexec_onnx"] = module
    spec.loader.exec_module(module)
    return module


tool = load()


@pytest.fixture(scope="module")
def exported() -> OnnxModel:
    return OnnxModel.load(sources().onnx)


def test_only_ops_without_a_plugin_keep_bodies(exported, tmp_path):
    """Nodes are the exported ones; their words lie in the GPU's order; a second run does not overwrite."""
    path = tool.write(exported, tmp_path / "out")
    before, after = ir.load(exported.path), ir.load(path)
    ours = [node for node in after.graph if node.domain == DOMAIN]
    assert Counter(node.op_type for node in before.graph) == Counter(node.op_type for node in after.graph)
    native = {op.name for op in OPS if op.native}
    assert native & {node.op_type for node in ours} and not native & {name for _, name, _ in after.functions}
    gemms = [node for node in ours if "Gemm" in node.op_type]
    assert gemms and all(node.attributes["layout"].as_int() == kernel.FRAGMENT_ORDER for node in gemms)
    assert any("packed" in node.attributes for node in gemms)  # of codes of 4 bits
    with pytest.raises(Misuse, match="is already there"):
        tool.write(exported, tmp_path / "out")


def test_the_shapes_are_trtexecs(exported):
    given = tool.shapes(exported, "usual")
    assert re.fullmatch(r"(\w+:\d+(x\d+)*,)*\w+:\d+(x\d+)*", given)
    names = [port.name for port in exported.manifest.inputs]
    assert [part.partition(":")[0] for part in given.split(",")] == names


def test_every_command_says_whether_it_ran(exported):
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| step")]
    assert len(rows) >= 9
    for row in rows:
        assert len(row) == 3 and re.search(r"not run|x86-64", row[2]), row[0]
    for name, which in tool.SHAPES.items():
        batch = re.search(rf"--{name}=hidden_states:(\d+)x", PAGE)[1]
        assert tool.shapes(exported, which).startswith(f"hidden_states:{batch}x")
