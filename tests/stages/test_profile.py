"""What profile says of an engine: who was timed, what a node costs, and a trace that nests. Never how long it took."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from dit2deploy.artefacts.bundle import PROFILE
from dit2deploy.artefacts.onnx_model import PortRecord
from dit2deploy.base.errors import Misuse
from dit2deploy.stages.profile import profile, summary
from dit2deploy.stages.profile.contestants import inputs_of
from dit2deploy.stages.profile.costs import cost_of
from dit2deploy.stages.profile.measure import Contestant, race, ratios, statistics
from dit2deploy.stages.profile.ops import NodeTime, chrome_trace, joined, node_times
from dit2deploy.stages.profile.roofline import Peaks, by_op, placed
from tests.stages.tiny_bundle import SIZE, tiny_bundle

TRTEXEC = [  # the order of trtexec's --exportTimes
    *("startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs", "startD2hMs", "endD2hMs"),
    *("h2dMs", "computeMs", "d2hMs", "latencyMs", "endToEndMs"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def result(bundle):
    return profile(bundle.folder, target="reference", threads=(1, 2), batches=(1, 3), runs=4)


def test_every_setting_is_measured_side_by_side(result):
    settings = {(row["name"], row["threads"], row["batch"]) for row in result["latency"]}
    assert settings == {(name, t, b) for name in ("engine", "ort-fp32") for t in (1, 2) for b in (1, 3)}
    assert result["headline"] == {"threads": 2, "batch": 1}
    for row in result["latency"]:
        assert row["runs"] == 4
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["samples_per_second"] == pytest.approx(1000 * row["batch"] / row["p50_ms"])
    assert {row["baseline"] for row in result["ratios"]} == {"ort-fp32"}


def test_what_is_not_measured_says_why(result):
    reasons = {entry["what"]: entry["reason"] for entry in result["not_measured"]}
    assert "gone" in reasons["PyTorch fp32 eager"] or "torch is not installed" in reasons["PyTorch fp32 eager"]


def test_memory_is_read_in_a_child(result):
    assert set(result["memory"]) == {"engine", "ort-fp32"}
    for held in result["memory"].values():
        assert held["anonymous_bytes"] > 0
        assert held["peak_bytes"] > held["anonymous_bytes"]


def test_ops_and_layers_are_told(result):
    assert {row["op"] for row in result["ops"]} == {"MatMul", "Add", "Cast", "Tanh", "Reshape", "Mul"}
    assert sum(row["share"] for row in result["ops"]) == pytest.approx(1)
    matmul = next(row for row in result["ops"] if row["op"] == "MatMul")
    assert matmul["macs"] == SIZE**3
    assert [row["layer"] for row in result["layers"]] == ["blocks.0.attn.to_q"]


def test_the_files_are_there(bundle, result):
    read = json.loads((bundle.folder / PROFILE).read_text())
    assert read["kind"] == "profile"
    assert read["latency"] == result["latency"]
    assert {"date", "machine", "versions", "command"} <= set(read)
    for name in ("latency.svg", "latency.png", "ops.svg", "ops.png"):
        assert (bundle.folder / "profile" / name).stat().st_size > 1000
    trace = json.loads((bundle.folder / "profile" / "trace.json").read_text())
    _check_nesting(trace)
    assert "engine is" in summary(result)


def test_nvidias_files_are_beside_it(bundle, result):
    """Times, profile and layers as trtexec writes them."""
    folder = bundle.folder / "profile"
    runs, rows, layers = (
        json.loads((folder / f"{name}_reference.json").read_text()) for name in ("times", "profile", "layers")
    )
    milliseconds = [run["computeMs"] for run in runs]
    headline = next(row for row in result["latency"] if row["name"] == "engine")
    assert len(runs) == headline["runs"]
    assert np.median(milliseconds) == pytest.approx(headline["p50_ms"])
    assert list(runs[0]) == TRTEXEC
    for before, after in itertools.pairwise(runs):
        assert before["endComputeMs"] <= after["startComputeMs"]
        assert after["endComputeMs"] - after["startComputeMs"] == pytest.approx(after["latencyMs"])
    head, *nodes = rows
    assert head == {"count": 4}
    assert sum(row["percentage"] for row in nodes) == pytest.approx(100)
    for row in nodes:
        assert row["timeMs"] == pytest.approx(head["count"] * row["averageMs"])
    assert [row["name"] for row in nodes] == [layer["Name"] for layer in layers["Layers"]]
    mix = next(layer for layer in layers["Layers"] if layer["LayerType"] == "MatMul")
    assert mix["Metadata"] == "blocks.0.attn.to_q"
    assert [tensor["Dimensions"] for tensor in mix["Inputs"]] == [[1, 1, SIZE, SIZE], [SIZE, SIZE]]


def _check_nesting(trace):
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    steps = [event for event in slices if event["cat"] == "step"]
    assert len(steps) == 3
    for event in slices:
        assert event["ts"] >= 0
        assert any(s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"] for s in steps)


def test_the_engine_alone(bundle, tmp_path):
    alone = profile(bundle.folder, target="reference", threads=(1,), runs=3, baselines=False)
    assert {row["name"] for row in alone["latency"]} == {"engine"}
    assert alone["ratios"] == []


@pytest.mark.parametrize("options", [{"batches": ()}, {"batches": (0,)}, {"threads": (0,)}, {"runs": 0}])
def test_senseless_options_are_refused(bundle, options):
    with pytest.raises(Misuse, match="must be positive"):
        profile(bundle.folder, target="reference", **options)


def test_a_target_that_is_not_in_the_bundle_is_refused(bundle):
    with pytest.raises(Misuse, match="no engine for ort-cpu"):
        profile(bundle.folder)


def test_recorded_inputs_are_repeated_to_the_batch(bundle):
    inputs = inputs_of(bundle, batch=5)
    recorded = bundle.reference()["input.hidden_states"][1]
    assert np.array_equal(inputs["hidden_states"], recorded[[0, 1, 0, 1, 0]])
    assert inputs["class_labels"].tolist() == [1, 2, 1, 2, 1]


def test_an_open_first_axis_that_is_no_batch_is_kept_whole(bundle):
    """FLUX's positions, [tokens, 3]."""
    ports = [port for port in bundle.manifest.inputs if port.name != "class_labels"]
    positions = PortRecord(name="class_labels", dtype="int64", shape=("tokens",))
    manifest = bundle.manifest.model_copy(update={"inputs": (*ports, positions)})
    inputs = inputs_of(dataclasses.replace(bundle, manifest=manifest), batch=1)
    assert len(inputs["hidden_states"]) == 1 and inputs["class_labels"].tolist() == [1, 2]


def test_contestants_take_turns():
    order = []
    contestants = [Contestant(name, name, lambda name=name: order.append(name)) for name in "ab"]
    times = race(contestants, rounds=6)
    assert [len(found) for found in times.values()] == [6, 6]
    assert "".join(order[6:]) == "aabb" * 6  # after the warm-up: an untimed and a timed run each
    assert len(race(contestants, rounds=100, seconds=0)["a"]) == 5


def test_ratios_are_taken_within_rounds():
    times = {"engine": [1.0, 10.0, 2.0], "other": [2.0, 20.0, 4.0]}
    assert ratios(times, "engine") == {"other": {"ratio": 2.0, "p25": 2.0, "p75": 2.0}}
    assert statistics([1.0, 2.0, 3.0], batch=4)["samples_per_second"] == 2000


@pytest.mark.parametrize(
    ("op", "inputs", "output", "macs", "float_macs"),
    [
        ("TernaryGemm", [("int8", [2, 8, 60]), ("float", [2, 8, 1]), ("int32", [40, 3])], [2, 8, 40], 16 * 60 * 40, 0),
        (
            "Int4GemmLowRank",
            [("int8", [8, 60]), *[("float", [1])] * 4, ("float", [8, 4]), ("float", [40, 4])],
            [8, 40],
            8 * 60 * 40,
            8 * 4 * 40,
        ),
        ("MatMul", [("float", [2, 3, 8, 5]), ("float", [2, 3, 5, 7])], [2, 3, 8, 7], 0, 6 * 8 * 5 * 7),
        (
            "Int4GemmLowRankResidual",
            [
                *[("int8", [2, 8, 60]), ("float", [2, 8, 1]), ("int32", [40, 8]), ("float", [40, 1]), ("float", [40])],
                *[("float", [2, 8, 4]), ("float", [40, 4]), ("float", [2, 8, 40]), ("float", [2, 1, 40])],
            ],
            [2, 8, 40],
            16 * 60 * 40,
            16 * 4 * 40,
        ),
        ("TernaryGemmResidual", [("int8", [2, 8, 60])], [2, 8, 40], 16 * 60 * 40, 0),
        ("Gemm", [("float", [1, 16]), ("float", [16, 9]), ("float", [9])], [1, 9], 0, 144),
        ("Add", [("float", [4])], [4], 0, 0),
        ("TernaryGemm", [("int8", [0, 60]), ("float", [0, 1]), ("int32", [40, 3])], [0, 40], 0, 0),
    ],
)
def test_costs_follow_from_shapes(op, inputs, output, macs, float_macs):
    cost = cost_of(op, inputs, [("float", output)])
    assert (cost.macs, cost.float_macs) == (macs, float_macs)
    sizes = {"float": 4, "int8": 1, "int32": 4}
    assert cost.bytes == sum(sizes[t] * int(np.prod(shape)) for t, shape in inputs) + 4 * int(np.prod(output))


def test_the_share_of_the_peak_is_that_of_the_nearer_bound():
    machine = Peaks(macs_per_second=1e9, bytes_per_second=1e9, how="")
    gemm = cost_of("Int8Gemm", [("int8", [100, 100])], [("float", [100, 100])])
    moved = cost_of("HadamardQuantize", [("float", [1000])], [("int8", [1000])])
    nodes = [
        NodeTime("a", "Int8Gemm", "x", 2.0, gemm),
        NodeTime("b", "HadamardQuantize", "x", 0.01, moved),
        NodeTime("c", "MatMul", "", 1.0, gemm),
    ]
    rows = placed(nodes, machine)
    assert [row["node"] for row in rows] == ["a", "b"]
    assert [row["bound"] for row in rows] == ["compute", "memory"]
    assert [row["share"] for row in rows] == pytest.approx([0.5, 0.5])
    assert by_op(rows)[0]["macs_per_second"] == pytest.approx(5e8)


def test_node_times_are_medians_and_the_trace_starts_at_zero():
    runs = [
        [
            {"name": "model_run", "cat": "Session", "ts": start, "dur": 50},
            {"name": "g_kernel_time", "cat": "Node", "ts": start + 5, "dur": duration, "args": {"op_name": "Int8Gemm"}},
        ]
        for start, duration in ((1000, 10), (2000, 30), (3000, 20))
    ]
    (node,) = node_times(runs, {"g": "a.to_q"})
    assert (node.milliseconds, node.op, node.layer) == (0.02, "Int8Gemm", "a.to_q")
    events = [event for event in chrome_trace(runs, {}, title="t")["traceEvents"] if event["ph"] == "X"]
    assert min(event["ts"] for event in events) == 0


def test_layers_that_share_a_node_are_named_short():
    assert joined(["a.0.to_q", "a.0.to_k", "a.0.to_v"]) == "a.0.to_q, to_k, to_v"
    assert joined(["a.b", "c.d"]) == "a.b, c.d"
    assert joined(["a.b"]) == "a.b"
