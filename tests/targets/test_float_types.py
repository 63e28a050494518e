"""Graphs whose activations are halves: what they compute, and what stays float32."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.ops import DOMAIN
from dit2deploy.targets import float_types, ort_cpu, ort_cuda, reference, tensorrt_rtx
from dit2deploy.targets.float_types import HALVES, floats_of, use_half_activations
from dit2deploy.targets.graph import JOINED, OF_HALVES, add_outputs, is_gemm
from tests.bundles import sources
from tests.half_engines import evaluator, lowered

ABLE = tensorrt_rtx.availability()
builds = pytest.mark.skipif(not ABLE.can_build, reason=f"tensorrt-rtx: {ABLE.reason}")


@pytest.fixture(scope="module")
def calls() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((3, 1, 8, 8)).astype(np.float32)
    return {"hidden_states": latents, "timestep": np.array([999, 500, 3]), "class_labels": np.array([1, 9, 4])}


@pytest.fixture(scope="module")
def computed(calls):
    def run(floats: str) -> np.ndarray:
        (y,) = evaluator(lowered(floats)).run(["sample"], calls)
        return y

    return run


@pytest.fixture(scope="module")
def single(computed) -> np.ndarray:
    return computed("float32")


@pytest.mark.parametrize(("floats", "least"), [("float16", 35), ("bfloat16", 30)])
def test_halves_compute_nearly_what_float32_does(computed, single, floats: str, least: float):
    """In dB; a value that half precision moves may take another code, which is what the most of the noise is."""
    got = computed(floats)
    assert got.dtype == np.float32 and got.shape == single.shape
    noise = np.square((got - single).astype(np.float64)).sum()
    sqnr = 10 * np.log10(np.square(single.astype(np.float64)).sum() / noise)
    assert sqnr > least


@pytest.mark.parametrize("floats", HALVES)
def test_no_cast_stands_between_our_ops(floats: str):
    half, model = HALVES[floats], lowered(floats)
    ours = [node for node in model.graph if node.domain == DOMAIN]
    assert {node.attributes["dtype"].as_int() for node in ours} == {half.value}
    assert {node.outputs[0].dtype for node in ours if is_gemm(node)} == {half}
    casts = [node for node in model.graph if node.op_type == "Cast" and node.inputs[0].dtype == half]
    before = {node.inputs[0].producer().op_type for node in casts if node.inputs[0].producer() is not None}
    # To float32: the sums of low-rank branches, what is normalized by a plain op, and the output.
    assert before <= {"MatMul", "TernaryGemmLowRankResidual", "Reshape"}, before


@pytest.mark.parametrize("floats", HALVES)
def test_what_needs_float32_keeps_it(floats: str):
    model = lowered(floats)
    kept = [node for node in model.graph if node.op_type in ("Sin", "Cos", "LayerNormalization")]
    assert len(kept) == 3
    assert {value.dtype for node in kept for value in (*node.inputs, *node.outputs)} == {ir.DataType.FLOAT}
    names = [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)]
    before = ir.load(sources().onnx / "model.onnx").graph
    assert names == [(value.name, value.dtype) for value in (*before.inputs, *before.outputs)]


LOWEST = float(np.finfo(np.float32).min)


def masked_attention(form: str) -> ir.Model:
    """softmax(q k^T + mask) v with a mask [1, 1, L] made from booleans, or numbers of them, as models make it."""
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node
    made = {
        "chosen": [node("Where", ["keep", "zero", "lowest"], ["bias"])],
        "scaled": [
            node("Cast", ["keep"], ["k"], to=1),
            node("Sub", ["one", "k"], ["n"]),
            node("Mul", ["n", "lowest"], ["bias"]),
        ],
    }
    nodes = [
        *made[form],
        node("Unsqueeze", ["bias", "axis"], ["mask"]),
        node("MatMul", ["q", "kt"], ["scores"]),
        node("Add", ["scores", "mask"], ["masked"]),
        node("Softmax", ["masked"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["y"]),
    ]
    numbers = {"zero": np.float32(0), "one": np.float32(1), "lowest": np.float32(LOWEST), "axis": np.array([1])}
    graph = onnx.helper.make_graph(
        nodes,
        "attention",
        [info("q", 1, (2, 4, 8)), info("kt", 1, (2, 8, 5)), info("v", 1, (2, 5, 8)), info("keep", 9, (2, 5))],
        [info("y", 1, (2, 4, 8))],
        [onnx.numpy_helper.from_array(value, name) for name, value in numbers.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


@pytest.mark.parametrize("form", ("chosen", "scaled"))
@pytest.mark.parametrize("floats", HALVES)
def test_rows_that_are_masked_whole_are_means_and_not_nan(floats: str, form: str, monkeypatch):
    """As in float32, where the lowest number plus any score is the lowest number. The second row keeps two keys."""
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 4, 8), "kt": (2, 8, 5), "v": (2, 5, 8)}
    calls = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    calls["keep"] = np.array([[False] * 5, [True, False, True, False, False]])

    def computed(model: ir.Model) -> np.ndarray:
        (y,) = ReferenceEvaluator(ir.to_proto(model)).run(["y"], calls)
        return y

    single, half = computed(masked_attention(form)), masked_attention(form)
    use_half_activations(half, floats)
    (bounded,) = [node for node in half.graph if node.op_type == "Clip"]
    assert bounded.inputs[0].name == "mask"
    np.testing.assert_allclose(single[0], np.broadcast_to(calls["v"][0].mean(0), (4, 8)), atol=1e-6)
    np.testing.assert_allclose(computed(half), single, atol=0.05)

    monkeypatch.setattr(float_types, "_holds_more", lambda value, half: False)
    without = masked_attention(form)
    use_half_activations(without, floats)
    with np.errstate(all="ignore"):
        assert np.isnan(computed(without)[0]).all()


def test_a_value_of_unknown_type_is_named():
    model = ir.load(sources().onnx / "model.onnx")
    node = next(node for node in model.graph if node.op_type == "Softmax")
    node.outputs[0].type = None
    with pytest.raises(Misuse, match=f"value {node.outputs[0].name}: the ONNX file does not tell its type"):
        use_half_activations(model, "float16")


def test_unknown_floats_name_the_known():
    with pytest.raises(Misuse, match=r"(?s)knows no floats 'float8'.*float32, float16, bfloat16"):
        floats_of("tensorrt-rtx", {"floats": "float8"})


@pytest.mark.parametrize("target", [ort_cpu.TARGET, reference.TARGET], ids=lambda target: target.name)
def test_a_target_without_halves_refuses_them(target, tmp_path):
    with pytest.raises(Misuse, match=f"target {target.name} has no option floats"):
        target.build(OnnxModel.load(sources().onnx), root=tmp_path, options={"floats": "float16"})


def test_the_custom_ops_of_halves_go_by_their_names(tmp_path):
    onnx_model = OnnxModel.load(sources().onnx)
    single = ort_cuda.build(onnx_model, root=tmp_path, options={})
    record = ort_cuda.build(onnx_model, root=tmp_path, options={"floats": "float16"})
    model = ir.load(tmp_path / record.engines["onnx"])
    ours = [node for node in model.graph if node.domain == DOMAIN]
    assert ours and all(node.op_type.endswith(OF_HALVES) for node in ours) and not model.functions
    assert (single.details["floats"], record.details["floats"]) == ("float32", "float16")
    assert {**record.details["parts"], "graph": 0} == {**single.details["parts"], "graph": 0}
    (attention,) = {node.outputs[0].dtype for node in model.graph if node.op_type == "MultiHeadAttention"}
    assert attention == HALVES["float16"]
    joined = next(node.outputs[0].name for node in ours if "Residual" in node.op_type)
    add_outputs(model, [joined.removesuffix(JOINED)])
    plain = model.graph.outputs[-1]
    assert plain.producer().op_type == "TernaryGemmLowRankFloat16" and plain.dtype == HALVES["float16"]
    with pytest.raises(Misuse, match="takes no bfloat16"):
        ort_cuda.build(onnx_model, root=tmp_path, options={"floats": "bfloat16"})


@builds
@pytest.mark.parametrize(
    ("floats", "capabilities"), [("float16", ("7.5", "8.0", "12.0")), ("bfloat16", ("8.0", "8.9", "12.0"))]
)
def test_an_engine_of_halves_keeps_all_plugins(tmp_path, floats: str, capabilities: tuple[str, ...]):
    options = {"floats": floats, "compute_capabilities": capabilities}
    record = tensorrt_rtx.build(OnnxModel.load(sources().onnx), root=tmp_path, options=options)
    (told,) = record.details["engines"].values()
    assert told["float_parts"] == floats and tuple(told["compute_capabilities"]) == capabilities
    assert told["engine_plugins"] == told["network_plugins"] and told["plugin_layers"] > 20
    assert told["packed_weights_found_once"] == told["packed_weights"]


def test_turing_has_no_bfloat16():
    with pytest.raises(Misuse, match=r"(?s)7\.5 has no bfloat16.*--compute-capability"):
        tensorrt_rtx.plan_engines(("8.6", "7.5"), "bfloat16")
