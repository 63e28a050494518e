"""Thresholds of engines in half precision: where they come from, a sound engine above them, wrong ones below.

The engines are those of tests/half_engines.py: on the CPU, with the types and casts that those for GPUs have.
"""

import functools

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from dit2deploy.artefacts.bundle import Bundle, Thresholds
from dit2deploy.formats import TERNARY, pack, unpack
from dit2deploy.stages.build import build
from dit2deploy.stages.parity import checks
from dit2deploy.stages.parity.evidence import gather, problem_of
from dit2deploy.stages.parity.references import find
from dit2deploy.targets.float_types import HALVES, thresholds_of
from dit2deploy.targets.graph import JOINED, WS, W
from tests import half_engines
from tests.bundles import sources

LAYER, BEHIND = (f"transformer_blocks.1.attn1.{name}" for name in ("to_k", "to_q"))
BITS = {"float16": 11, "bfloat16": 8, "float32": 24}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def test_float32_has_the_thresholds_of_before():
    assert Thresholds.of_significand(BITS["float32"]) == Thresholds()
    assert thresholds_of("float32") is None


@pytest.mark.parametrize(
    ("floats", "expected"), [("float16", (30.6, 60.2, 20.0, 20.0)), ("bfloat16", (21.6, 42.2, 11.6, 11.6))]
)
def test_a_type_has_its_thresholds(floats: str, expected: tuple[float, ...]):
    found = thresholds_of(floats)
    assert [round(value, 1) for value in found.model_dump().values()] == list(expected)


def hadamard(size: int) -> np.ndarray:
    return np.ones((1, 1)) if size == 1 else np.kron([[1, 1], [1, -1]], hadamard(size // 2))


@pytest.mark.parametrize(("qmax", "rms"), [(7, 2.8), (31, 10.0), (1, 0.5)])
@pytest.mark.parametrize("floats", HALVES)
def test_the_noise_of_codes_that_move_is_what_the_formula_says(floats: str, qmax: int, rms: float):
    """Rows of normal values, rounded twice and rotated; to steps of which the codes have that root mean square."""
    random = np.random.default_rng(0)
    x, factor = random.standard_normal((2000, 256)), random.uniform(1, 2, 256)
    rounded = x.astype(DTYPES[floats]).astype(np.float64) * factor
    rounded = rounded.astype(DTYPES[floats]).astype(np.float64)
    scale, rotation = rms / np.sqrt((factor**2).mean()), hadamard(256) / 16
    exact, given = (np.rint(np.clip(value @ rotation * scale, -qmax, qmax)) for value in (x * factor, rounded))
    found = 10 * np.log10(rms**2 / np.mean((exact - given) ** 2))
    expected = 10 * np.log10(2.0 ** BITS[floats]) + 5 + 10 * np.log10(rms) - 5 * np.log10(2)
    assert found == pytest.approx(expected, abs=1.5)


@functools.cache
def bundle() -> Bundle:
    made = sources()
    out = made.onnx.with_name("bundle of halves")
    return build(made.onnx, out, targets=["reference"], calibration=made.calibration, model=made.pipeline)


def verdicts(floats: str, thresholds: Thresholds, change=lambda model: None) -> dict[str, dict]:
    made = sources()
    references = find(bundle(), model=made.pipeline, checkpoint=made.checkpoint)
    problem = problem_of(bundle(), references, steps=3, seed=0)
    evidence = gather(problem, half_engines.target(floats, change), references)
    return checks.engine_against_quantized(problem, evidence, thresholds)


def statuses(found: dict[str, dict]) -> list[str]:
    return [check["status"] for check in found.values()]


@pytest.mark.parametrize("floats", HALVES)
def test_a_sound_engine_passes_and_would_not_by_the_thresholds_of_float32(floats: str):
    thresholds = thresholds_of(floats)
    found = verdicts(floats, thresholds)
    assert statuses(found) == ["passed"] * 3
    least = min(value["sqnr_db"] for value in found["layers"]["values"])
    assert thresholds.layer_db + 5 < least < thresholds.layer_db + 12
    assert least < Thresholds().layer_db


def gemm_of(model: ir.Model, layer: str) -> ir.Node:
    name = bundle().manifest.layers[layer].output
    return next(node for node in model.graph if node.outputs and node.outputs[0].name in (name, name + JOINED))


def one_moved_weight(model: ir.Model, _floats: str) -> None:
    """One trit of one output channel by one step."""
    gemm = gemm_of(model, LAYER)
    words, k = gemm.inputs[W], gemm.inputs[0].shape[-1]
    codes, place = unpack(words.const_value.numpy(), TERNARY, k).astype(int), bundle().manifest.layers[LAYER].begin
    codes[place, 3] += 1 if codes[place, 3] < 1 else -1
    words.const_value = ir.tensor(pack(codes, TERNARY), name=words.name)


def wrong_scale(model: ir.Model, floats: str) -> None:
    """All of a layer's weights larger by a little more than its threshold lets pass."""
    scales, record = gemm_of(model, LAYER).inputs[WS], bundle().manifest.layers[LAYER]
    values = scales.const_value.numpy().copy()
    values[record.begin : record.end] *= 1 + 1.5 * 10 ** (-thresholds_of(floats).layer_db / 20)
    scales.const_value = ir.tensor(values, name=scales.name)


def another_gate(model: ir.Model, _floats: str) -> None:
    """What a GEMM with gate and residual makes is no layer's output: the layer behind it reads it."""
    gemm, other = (gemm_of(model, f"transformer_blocks.0.{name}") for name in ("ff.net.2", "attn1.to_out.0"))
    gemm.replace_input_with(len(gemm.inputs) - 1, other.inputs[-1])


@pytest.mark.parametrize(
    ("fault", "layer"),
    [(one_moved_weight, LAYER), (wrong_scale, LAYER), (another_gate, BEHIND)],
    ids=("one moved weight", "wrong scale", "another gate"),
)
@pytest.mark.parametrize("floats", HALVES)
def test_a_wrong_engine_fails_and_its_layer_is_named(floats: str, fault, layer: str):
    found = verdicts(floats, thresholds_of(floats), lambda model: fault(model, floats))
    assert (found["layers"]["status"], found["layers"]["first_diverging"]) == ("failed", layer)
