"""Stage parity: it passes a right engine, names the layer of a wrong one, and says what it could not check."""

import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from polygraphy.comparator import Comparator, CompareFunc, RunResults
from polygraphy.json import load_json

from dit2deploy.artefacts.bundle import MANIFEST, Bundle
from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.checkpoint import TENSORS
from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.base.files import write_json
from dit2deploy.stages.build import build
from dit2deploy.stages.export import export
from dit2deploy.stages.parity import parity, references, summary
from dit2deploy.stages.parity.compare import CompareFidelity, Fidelity, compare, recorded
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.report import parity_charts
from dit2deploy.stages.search import search
from dit2deploy.targets import Availability, Target, by_name
from tests.bundles import engines, move_one_weight, sources, take_another_gate

POLYGRAPHY = "import sys; from polygraphy.tools import main; sys.exit(main())"  # what its script does
LAYER = "transformer_blocks.1.attn1.to_k"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Bundle:
    made = sources()
    out = tmp_path_factory.mktemp("parity") / "bundle"
    return build(made.onnx, out, targets=engines(), calibration=made.calibration, model=made.pipeline)


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built.folder, tmp_path / "bundle")


@pytest.mark.parametrize("target", engines())
def test_a_right_engine_passes_all_checks(target: str, folder):
    result = parity(folder, target=target, steps=3)
    assert json.loads((folder / "parity.json").read_text()) == json.loads(json.dumps(result))
    own, cost = result["engine_against_quantized"], result["against_full_precision"]
    assert result["status"] == "passed"
    assert {check["status"] for check in own.values()} == {"passed"}
    assert {check["status"] for checks in cost.values() for check in checks.values()} == {"passed"}
    assert [value["layer"] for value in own["layers"]["values"]] == list(Bundle.load(folder).manifest.layers)
    assert own["layers"]["first_diverging"] is None
    assert min(value["sqnr_db"] for value in own["layers"]["values"]) > 45
    timesteps = [value["timestep"] for value in own["steps"]["values"]]
    assert timesteps == [value["timestep"] for value in own["trajectory"]["values"]] == sorted(timesteps, reverse=True)
    # Quantization to ternary costs far more than the engine's rounding: the two questions have two answers.
    assert own["trajectory"]["final"]["sqnr_db"] > cost["engine"]["trajectory"]["final"]["sqnr_db"] + 6
    text = summary(result)
    assert "does the engine compute the quantized model? passed" in text and "what did quantization cost?" in text


def test_models_above_memory_give_the_same_numbers(folder, monkeypatch):
    target = engines()[0]
    want = parity(folder, target=target, steps=3)
    monkeypatch.setattr(references, "room", lambda _: 0)
    got = parity(folder, target=target, steps=3)
    for question in ("engine_against_quantized", "against_full_precision"):
        assert got[question] == want[question]


def test_polygraphy_opens_what_was_compared(folder):
    """By its own loaders and by `polygraphy inspect data`; and its own comparison comes to the same differences."""
    result = parity(folder, target=engines()[-1], steps=3)
    results = RunResults.load(str(folder / "parity" / "outputs.json"))
    assert [name for name, _ in results] == [engines()[-1], "quantized PyTorch", "full-precision PyTorch"]
    inputs = load_json(str(folder / "parity" / "inputs.json"))
    values = result["engine_against_quantized"]["steps"]["values"]
    assert [float(feed["timestep"][0]) for feed in inputs] == [value["timestep"] for value in values]
    (engine, quantized), expected = (
        [iterations for _, iterations in results][:2],
        [value["max_abs"] for value in values],
    )
    for mine, other, most in zip(engine, quantized, expected, strict=True):
        compared = Comparator.compare_accuracy(
            RunResults([("a", [mine]), ("b", [other])]),
            compare_func=CompareFunc.simple(atol=most * 1.01 + 1e-12, rtol=0),
        )
        assert bool(compared)
    for name, value in (("inputs", "hidden_states"), ("outputs", "output")):
        told = subprocess.run(
            [sys.executable, "-c", POLYGRAPHY, "inspect", "data", str(folder / "parity" / f"{name}.json")],
            capture_output=True,
            text=True,
        )
        assert told.returncode == 0, told.stderr
        assert value in told.stdout


def test_layers_that_smoothing_divides_are_left_out_of_the_cost_by_name(tmp_path):
    """Their outputs are those of full precision divided channel by channel: int8 weights would seem to cost a lot."""
    made = sources()
    options = {"recipe": "w8a8", "smoothing": 0.9}
    policy = search(made.pipeline, tmp_path / "policy.json", **options)
    calibration = CalibrationSet.load(made.calibration)
    quantize(made.pipeline, policy, calibration, tmp_path / "checkpoint")
    onnx = export(tmp_path / "checkpoint", tmp_path / "onnx").folder
    folder = tmp_path / "bundle"
    build(onnx, folder, targets=["reference"], calibration=made.calibration, model=made.pipeline)
    result = parity(folder, target="reference", steps=3)
    divided = [f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in ("norm1.linear", "attn1.to_v")]
    own = {value["layer"] for value in result["engine_against_quantized"]["layers"]["values"]}
    for cost in result["against_full_precision"].values():
        assert sorted(cost["layers"]["left_out"]) == sorted(divided) and own >= set(divided)
        assert {value["layer"] for value in cost["layers"]["values"]} == own - set(divided)
        assert min(value["sqnr_db"] for value in cost["layers"]["values"]) > 25
    assert "4 layers left out: smoothing divides their outputs" in summary(result)
    figures = parity_charts.figures(result)
    assert "layers" in figures


@pytest.mark.parametrize("target", engines())
def test_one_wrong_weight_is_seen_and_its_layer_named(target: str, folder):
    move_one_weight(folder, target, LAYER)
    with pytest.raises(Failed, match=f"layer {LAYER} is the first that diverges"):
        parity(folder, target=target, steps=3)
    layers = json.loads((folder / "parity.json").read_text())["engine_against_quantized"]["layers"]
    assert layers["status"] == "failed" and layers["first_diverging"] == LAYER
    wrong = [value["layer"] for value in layers["values"] if value["worst_channel_db"] < layers["channel_threshold_db"]]
    assert wrong == [LAYER], "a wrong layer must not be blamed on those behind it"


@pytest.mark.parametrize("target", engines())
def test_a_wrong_gate_is_seen_by_the_next_layer(target: str, folder):
    """What a GEMM with gate and residual makes is no layer's output: the layer behind it reads it."""
    layer, behind = (f"transformer_blocks.0.{name}" for name in ("attn1.to_out.0", "ff.net.0.proj"))
    take_another_gate(folder, target, layer, "transformer_blocks.0.ff.net.2")
    with pytest.raises(Failed, match=f"layer {behind} is the first that diverges"):
        parity(folder, target=target, steps=3)


def test_a_changed_file_is_refused_before_anything_runs(folder):
    data = folder / "reference" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(Misuse, match="hash mismatch"):
        parity(folder, target="reference")


@pytest.mark.parametrize(("field", "match"), (("step_db", "at timestep"), ("trajectory_db", "the trajectory ends")))
def test_thresholds_come_from_the_manifest(folder, field: str, match: str):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["thresholds"][field] = 299.0
    write_json(folder / MANIFEST, manifest)
    with pytest.raises(Failed, match=match):
        parity(folder, target="reference", steps=3)
    assert (folder / "parity.json").exists()


def test_without_torch_the_recorded_steps_are_compared(folder, monkeypatch):
    monkeypatch.setattr(references, "_without_torch", lambda: "torch is not installed")
    result = parity(folder, target="reference")
    own = result["engine_against_quantized"]
    assert result["status"] == "passed" and own["steps"]["status"] == "passed"
    assert own["layers"] == own["trajectory"] == {"status": "not run", "reason": "torch is not installed"}
    assert len(own["steps"]["values"]) == 4
    assert result["against_full_precision"]["engine"]["steps"]["values"][0]["sqnr_db"] < 60
    assert "recorded outputs (torch is not installed)" in result["references"]["quantized PyTorch"]
    assert "not run: torch is not installed" in summary(result)


def test_without_torch_a_wrong_engine_still_fails(folder, monkeypatch):
    """Recorded steps see a model that is wrong as a whole, here one whose outputs were recorded of another."""
    monkeypatch.setattr(references, "_without_torch", lambda: "torch is not installed")
    real = Bundle.reference
    monkeypatch.setattr(Bundle, "reference", lambda self: {**real(self), "quantized": -real(self)["quantized"]})
    with pytest.raises(Failed, match="at timestep"):
        parity(folder, target="reference")


def test_a_target_that_cannot_run_is_neither_passed_nor_failed(folder, monkeypatch):
    able = Availability(can_build=True, can_run=False, reason="there is no NVIDIA driver.", cure="Use a GPU.")
    real = by_name("reference")
    fake = Target(real.name, lambda: able, real.check, real.build, real.open)
    monkeypatch.setitem(parity.__globals__, "by_name", lambda name: fake)
    result = parity(folder, target="reference")
    assert result["status"] == "not run"
    checks = [*result["engine_against_quantized"].values()]
    checks += [check for who in result["against_full_precision"].values() for check in who.values()]
    assert {check["status"] for check in checks} == {"not run"}
    assert all("no NVIDIA driver" in check["reason"] and check["cure"] == "Use a GPU." for check in checks)
    path = folder / "parity.json"
    assert json.loads(path.read_text())["status"] == "not run"
    measured = json.dumps({"status": "passed"})
    path.write_text(measured)
    with pytest.raises(Misuse, match="no NVIDIA driver"):
        parity(folder, target="reference")
    assert path.read_text() == measured


def test_sources_of_another_bundle_are_refused(folder, tmp_path):
    other = shutil.copytree(sources().checkpoint, tmp_path / "other")
    weights = other / TENSORS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Misuse, match="is not the checkpoint that"):
        parity(folder, target="reference", checkpoint=other)
    with pytest.raises(Misuse, match=r"no such (folder|file)"):
        parity(folder, target="reference", model=tmp_path / "nowhere")


def test_a_target_that_is_not_in_the_bundle_is_refused(folder):
    with pytest.raises(Misuse, match="has no engine for tensorrt-rtx"):
        parity(folder, target="tensorrt-rtx")


def test_nan_is_never_good():
    x = np.ones((2, 3), np.float32)
    bad = x.copy()
    bad[0, 0] = np.nan
    (found,) = compare(recorded("a", [{"layer": x}]), recorded("b", [{"layer": bad}]), threshold_db=-100.0)
    assert not found["layer"] and found["layer"].cosine == -1.0
    json.dumps(found["layer"].record(), allow_nan=False)


def test_the_comparison_serves_polygraphys_comparator_too():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 8)).astype(np.float32)
    results = RunResults()
    for name, value in (("a", x), ("b", x + np.float32(0.001)), ("c", x * 2)):
        results.extend(recorded(name, [{"layer": value}]))
    function = CompareFidelity(threshold_db=40.0)
    assert Comparator.compare_accuracy(results, compare_func=function, comparisons=[(0, 1)])
    assert not Comparator.compare_accuracy(results, compare_func=function, comparisons=[(0, 2)])


def _noisy(x: np.ndarray, where, size: float) -> np.ndarray:
    y = x + np.float32(1e-7) * np.abs(x).max()
    y[where] += np.float32(size) * np.random.default_rng(1).standard_normal(y[where].shape).astype(np.float32)
    return y


@pytest.mark.parametrize(
    ("where", "size", "good"),
    (((slice(None), 5), 1e-3, False), ((7, slice(None)), 0.05, True), ((slice(None), slice(None)), 0.05, False)),
    ids=("one channel of all tokens", "one token in all channels", "everything"),
)
def test_a_wrong_weight_is_told_from_a_rounding_tie(where, size: float, good: bool):
    x = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    thresholds = {"threshold_db": 40.0, "channel_threshold_db": 85.0}
    (found,) = compare(recorded("a", [{"layer": x}]), recorded("b", [{"layer": _noisy(x, where, size)}]), **thresholds)
    assert bool(found["layer"]) is good
    if good or where[1] == 5:
        assert found["layer"].sqnr_db > 40, "the whole value alone would have said nothing"


def test_a_tie_in_all_rows_of_one_step_is_no_wrong_weight():
    """All rows of an embedding of the timestep are alike: what spoils one spoils all, but not in the next step."""
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    one, every = [_noisy(x, slice(None), 1e-3), x, x], [_noisy(x, (slice(None), 5), 1e-3)] * 3
    expected = recorded("a", [{"layer": x}] * 3)
    for values, good in ((one, True), (every, False)):
        found = recorded("b", [{"layer": value} for value in values])
        steps = [step["layer"] for step in compare(expected, found, threshold_db=40.0, channel_threshold_db=85.0)]
        assert bool(functools.reduce(Fidelity.joined, steps)) is good
