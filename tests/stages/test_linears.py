"""The device table holds the linears that an engine really runs, is extended, and serves a search."""

import math

import numpy as np
import onnx_ir as ir
import pytest

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.artefacts.device_table import DeviceTable, Linear
from dit2deploy.base.errors import Misuse
from dit2deploy.cli import main
from dit2deploy.models import FAMILIES
from dit2deploy.models.load import load_transformer, open_model
from dit2deploy.nn.units import units_of
from dit2deploy.stages.profile.linears import _units, measure_ops, one_linear
from dit2deploy.stages.search import search
from dit2deploy.targets import kernel
from dit2deploy.targets.ort import open_session
from tests.bundles import sources
from tests.packing import tiny_module

QUICK = {"rounds": 1, "threads": 1}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(policy, table, its file) of the tiny DiT, its own formats and 4 or 6 bits."""
    made = sources()
    policy = Checkpoint.load(made.checkpoint).policy
    out = tmp_path_factory.mktemp("device") / "device.json"
    return policy, measure_ops(made.pipeline, policy, out, bits=(4, 6), device="here", **QUICK), out


def test_every_gemm_of_the_exported_model_is_in_the_table(measured):
    """Sizes, bits and ranks as the graph has them: q, k and v have become one there."""
    _, table, _ = measured
    times = [time.linear for time in table.times]
    graph, found = ir.load(sources().onnx / "model.onnx").graph, set()
    for node in graph:
        if node.domain != "dit2deploy" or "Gemm" not in node.op_type:
            continue
        n, bits = node.outputs[0].shape[-1], node.attributes["bits"].value
        k, rank = node.inputs[0].shape[-1], node.inputs[5].shape[-1] if len(node.inputs) > 5 else 0
        quantize = node.inputs[0].producer()
        block = quantize.attributes["block"].value
        weight = node.op_type.split("Gemm")[0].lower()
        same = [
            one
            for one in times
            if (one.n, one.k, one.weight, one.bits, one.low_rank, one.hadamard) == (n, k, weight, bits, rank, block)
        ]
        assert same, (node.op_type, n, k, bits, rank, block)
        found |= set(same)
    not_built = {one for one in times if one.bits == 6 or one.weight == "float"}
    assert found == set(times) - not_built
    assert all(math.isfinite(time.ms) and 0 < time.least_ms <= time.ms for time in table.times)


def test_its_models_have_the_shapes_that_they_are_named_for(measured, tmp_path):
    _, table, _ = measured
    kinds = {time.linear.weight: time.linear for time in table.times}
    kinds["Monarch"] = Linear(n=48, k=32, rows=5, weight="int4", bits=4, hadamard=8, low_rank=2, monarch=(2, 3, 1))
    for linear in kinds.values():
        model = one_linear(linear)
        path = tmp_path / "one.onnx"
        path.write_bytes(model.SerializeToString())
        runner = open_session(path, threads=1, library=kernel.library_path())
        y = runner.run({"x": np.ones((linear.rows, linear.k), np.float32)})["y"]
        assert y.shape == (linear.rows, linear.n) and np.isfinite(y).all()
        runner.close()


def test_a_table_is_extended_by_what_it_lacks_and_only_there(measured, tmp_path):
    policy, table, out = measured
    pipeline = sources().pipeline
    copy = tmp_path / "device.json"
    copy.write_bytes(out.read_bytes())
    more = measure_ops(pipeline, policy, copy, weights=("int4",), bits=(4,), device="here", **QUICK)
    assert more.times[: len(table.times)] == table.times and len(more.times) == len(table.times) + 4
    assert DeviceTable.load(copy) == more
    before = copy.read_bytes()
    measure_ops(pipeline, policy, copy, bits=(4, 6), device="here", **QUICK)
    assert copy.read_bytes() == before
    for changes, field in (({"batch": 2}, "batch"), ({"device": "there"}, "device"), ({"threads": 2}, "threads")):
        with pytest.raises(Misuse, match=f"is a table of {field}"):
            measure_ops(pipeline, policy, copy, **{"device": "here", **QUICK, **changes})
    assert copy.read_bytes() == before


def test_a_search_finds_all_that_it_asks_for(tmp_path, capsys):
    made = sources()
    base, device = tmp_path / "base.json", tmp_path / "device.json"
    search(made.pipeline, base, recipe="w1.58a4", low_rank=4)
    words = ["--policy", str(base), "--bits", "3,4", "--rounds", "1", "--threads", "1", "--batch", "2"]
    main(["measure-ops", str(made.pipeline), "-o", str(device), *words])
    assert "linears on" in capsys.readouterr().out
    options = {"calibration": CalibrationSet.load(made.calibration), "items": 4, "bits": (3, 4), "low_rank": 4}
    policy = search(made.pipeline, tmp_path / "p.json", recipe="robuq-ampn", device=device, budget="1000ms", **options)
    total = sum(time.ms for time in DeviceTable.load(device).times)
    assert 0 < policy.options["milliseconds"] < 3 * total


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_units_are_found_without_weights_as_with_them(family, tmp_path):
    tiny_module(family).save_pretrained(tmp_path / "model")
    shapes, units = _units(open_model(tmp_path / "model"), None)
    module, _ = load_transformer(tmp_path / "model")
    assert units == units_of(module, list(shapes), family.inputs(module.config, batch=1, seed=0))
    assert sum(len(unit.layers) for unit in units) == len(shapes)


def test_what_does_not_fit_is_refused(measured, tmp_path):
    policy, _, _ = measured
    with pytest.raises(Misuse, match="bits 2 .. 8"):
        measure_ops(sources().pipeline, policy, tmp_path / "t.json", bits=(1, 4))
    other = policy.model_copy(update={"model": "SD3Transformer2DModel"})
    with pytest.raises(Misuse, match="is a policy for"):
        measure_ops(sources().pipeline, other, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
