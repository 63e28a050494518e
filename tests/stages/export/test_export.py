"""Exported files: they compute what PyTorch does in plain ONNX Runtimes, old and new, and hold what they should."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.onnx_model import DATA, OnnxModel
from dit2deploy.base import progress
from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.base.files import write_json
from dit2deploy.evaluate.fidelity import sqnr_db
from dit2deploy.models import FAMILIES
from dit2deploy.models.load import linears_of
from dit2deploy.nn.convert import quantized_linears
from dit2deploy.ops import DOMAIN
from dit2deploy.stages.export import check, export
from dit2deploy.targets.ort import open_session
from tests.packing import pack_checkpoint, policy_of, tiny_module, with_equal_embedders

ROOT = Path(__file__).resolve().parents[3]
FORMS = ("fused", "qdq", "float")
NAMES = [family.name for family in FAMILIES]
each_form = pytest.mark.parametrize("form", FORMS)
# The forms treat blocks alike: of qdq DiT and FLUX (joined rows, two kinds of blocks) are enough for every run.
EVERY_QDQ = ("dit", "flux")


def exports(forms: Sequence[str]) -> pytest.MarkDecorator:
    """name, form of all families; `-m slow` runs those that are left out otherwise, half a minute each."""

    def one(name: str, form: str) -> Any:
        marks = pytest.mark.slow if form == "qdq" and name not in EVERY_QDQ else ()
        return pytest.param(name, form, marks=marks, id=f"{name}-{form}")

    return pytest.mark.parametrize("name, form", [one(name, form) for name in NAMES for form in forms])


each_export, each_quantized_export = exports(FORMS), exports(FORMS[:2])

OLD_RUNTIME = """
import json, sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
np.save(sys.argv[3], session.run(None, dict(np.load(sys.argv[2])))[0])
print(onnxruntime.__version__)
"""


def graph_of(model: OnnxModel) -> onnx.GraphProto:
    return onnx.load(model.path, load_external_data=False).graph


def count(model: OnnxModel) -> Counter[str]:
    return Counter(node.op_type for node in graph_of(model).node if node.domain == DOMAIN)


def least_db(form: str) -> float:
    """Rounding only in the float form; single codes that fall the other way at ties in the quantized ones."""
    return 100.0 if form == "float" else 40.0


@each_export
def test_it_computes_what_pytorch_computes_by_its_bodies(name, form, exported):
    made = exported(name, form)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(made.model.path), options, providers=["CPUExecutionProvider"])
    for batch, second in ((2, False), (5, True)):
        inputs, want = made.call(batch=batch, second=second)
        (got,) = session.run(None, inputs)
        assert got.shape == want.shape
        assert sqnr_db(want, got) > least_db(form)


@each_export
def test_it_runs_in_the_oldest_runtime(name, form, exported, tmp_path):
    old = os.environ.get("D2D_OLD_ORT")
    if not old:
        pytest.skip("D2D_OLD_ORT names no folder with onnxruntime 1.18 (pip install --target)")
    made = exported(name, form)
    inputs, want = made.call(batch=3, second=True)
    np.savez(tmp_path / "inputs.npz", **inputs)
    done = subprocess.run(
        [sys.executable, "-c", OLD_RUNTIME, made.model.path, tmp_path / "inputs.npz", tmp_path / "output.npy"],
        env={**os.environ, "PYTHONPATH": old},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1.18")
    assert sqnr_db(want, np.load(tmp_path / "output.npy")) > least_db(form)


@each_form
def test_the_reference_evaluator_runs_it(form, exported):
    made = exported("dit", form)
    inputs, want = made.call(batch=3, second=True)
    (got,) = ReferenceEvaluator(str(made.model.path)).run(None, inputs)
    assert sqnr_db(want, got) > least_db(form)


@each_quantized_export
def test_layers_are_where_the_manifest_says(name, form, exported):
    """Every quantized layer's own output, by value name and channels, against PyTorch's."""
    made = exported(name, form)
    found, outputs = quantized_linears(made.module), {}

    def keep(layer_name):
        return lambda module, args, y: outputs.update({layer_name: y.numpy()})

    hooks = [layer.register_forward_hook(keep(layer_name)) for layer_name, layer in found.items()]
    inputs, _ = made.call(batch=2, second=False)
    for hook in hooks:
        hook.remove()
    layers = made.model.manifest.layers
    assert set(layers) == set(found)
    values = sorted({record.output for record in layers.values()})
    got = open_session(made.model.path, optimize=False, values=values).run(inputs)
    for layer_name, record in layers.items():
        part = got[record.output][..., record.begin : record.end]
        # Codes at ties leave 29 dB in one layer of the tiny FLUX; another layer's output would give about 0 dB.
        assert sqnr_db(outputs[layer_name], part) > 20, layer_name


def test_layers_come_in_execution_order(exported):
    layers = list(exported("dit", "fused").model.manifest.layers)
    assert layers.index("transformer_blocks.0.norm1.linear") < layers.index("transformer_blocks.0.attn1.to_q")
    assert layers.index("transformer_blocks.0.attn1.to_out.0") < layers.index("transformer_blocks.0.ff.net.0.proj")
    assert layers.index("transformer_blocks.0.ff.net.2") < layers.index("transformer_blocks.1.attn1.to_q")


def test_q_k_and_v_share_one_quantization_and_one_gemm(exported):
    made = exported("dit", "fused")
    blocks = made.module.config["num_layers"]
    # A block quantizes six inputs (of the embedder's second layer, the modulation, q k v, output, and two of the MLP);
    # the first layers of all embedders share one: the timestep's features. The last layer, which is not quantized,
    # reads the SiLU before the first block's modulation too.
    assert count(made.model) == {
        "HadamardQuantize": 1 + blocks,
        "AdaLnHadamardQuantizeKeep": 2 * blocks,
        "ActivationHadamardQuantize": 2 * blocks - 1,
        "ActivationHadamardQuantizeKeep": 1 + blocks,
        "Int8Gemm": 3 * blocks,
        "TernaryGemmLowRank": 2 * blocks,
        "TernaryGemmLowRankResidual": 2 * blocks,
    }
    for i in range(blocks):
        attention = f"transformer_blocks.{i}.attn1"
        records = [made.model.manifest.layers[f"{attention}.to_{x}"] for x in "qkv"]
        assert [(r.output, r.begin, r.end) for r in records] == [
            (f"{attention}.to_q+to_k+to_v", 48 * j, 48 * j + 48) for j in range(3)
        ]


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_initializers_are_named_by_checkpoint_keys(name, exported):
    made = exported(name, "qdq")
    keys = set(made.module.state_dict())
    names = {initializer.name for initializer in graph_of(made.model).initializer}
    packed = {f"{layer}.weight" for layer in quantized_linears(made.module)}
    assert packed <= names
    assert {n for n in names if n.rpartition(".")[2] in ("weight", "weight_scale", "bias", "down", "up")} <= keys


def test_embedders_that_are_equal_are_computed_once(tmp_path):
    """As in a converted DiT, which has one a block. Where a single weight differs they are computed apart."""
    family = next(family for family in FAMILIES if family.name == "dit")
    source = tiny_module(family)
    gathers, places = [], []
    for name in ("equal", "different"):
        with_equal_embedders(source)
        if name == "different":
            source.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data[3, 5] += 1
        checkpoint = pack_checkpoint(tmp_path / f"{name}-checkpoint", source, policy_of(family, source))
        made = export(checkpoint.folder, tmp_path / name)
        gathers.append(sum(node.op_type == "Gather" for node in graph_of(made).node))
        linears = [f"transformer_blocks.{block}.norm1.emb.timestep_embedder.linear_2" for block in range(2)]
        places.append([made.manifest.layers[linear] for linear in linears])
    assert places[0][0] == places[0][1] and places[1][0] == places[1][1]  # the timestep's embedder is equal in both
    assert gathers[1] == gathers[0] + 1


def test_fused_weights_are_the_checkpoints_put_together(exported):
    made = exported("dit", "fused")
    tensors = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(made.model.path).graph.initializer}
    state = made.module.state_dict()
    for leaf in ("weight", "weight_scale", "bias", "down"):
        parts = [state[f"transformer_blocks.1.attn1.to_{x}.{leaf}"].numpy() for x in "qkv"]
        assert np.array_equal(tensors[f"transformer_blocks.1.attn1.to_q+to_k+to_v.{leaf}"], np.concatenate(parts))


def test_what_is_stored_narrow_stays_narrow(exported):
    kinds = {form: {i.name: i.data_type for i in graph_of(exported("dit", form).model).initializer} for form in FORMS}
    assert kinds["fused"]["proj_out_1.weight"] == kinds["qdq"]["proj_out_1.weight"] == onnx.TensorProto.FLOAT16
    assert kinds["float"]["proj_out_1.weight"] == onnx.TensorProto.FLOAT


@each_export
def test_the_file_keeps_the_rules(name, form, exported):
    model = exported(name, form).model
    proto = onnx.load(model.path, load_external_data=False)
    assert proto.ir_version <= 10
    onnx.checker.check_model(str(model.path), full_check=True)
    imports = {entry.domain: entry.version for entry in proto.opset_import}
    assert imports.pop("") == 20 and imports in ({}, {DOMAIN: 1})
    double = onnx.TensorProto.DOUBLE
    assert double not in {value.type.tensor_type.elem_type for value in proto.graph.value_info}
    assert double not in {initializer.data_type for initializer in proto.graph.initializer}
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    content = model.path.read_bytes()
    for secret in (str(ROOT), str(model.folder), sys.prefix, "site-packages", ".py"):
        assert secret.encode() not in content, secret
    shaped = {value.name for value in proto.graph.value_info} | {value.name for value in proto.graph.output}
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"dit2deploy", b"1")
            assert set(node.output) <= shaped


@each_form
def test_weights_lie_aligned_and_in_execution_order(form, exported):
    model = exported("dit", form).model
    offsets = []
    for initializer in graph_of(model).initializer:
        entries = {entry.key: entry.value for entry in initializer.external_data}
        if entries:
            assert entries["location"] == DATA
            offsets.append(int(entries["offset"]))
            assert offsets[-1] % (4096 if int(entries["length"]) >= 1 << 16 else 64) == 0
    assert offsets == sorted(offsets) and len(offsets) > 10


def test_the_manifest_tells_ports_and_axes(exported):
    manifest = exported("sd3", "fused").model.manifest
    ports = {port.name: (port.dtype, port.shape) for port in manifest.inputs}
    assert ports["hidden_states"] == ("float32", ("batch", 4, "height", "width"))
    assert ports["encoder_hidden_states"] == ("float32", ("batch", "text_tokens", 32))
    assert ports["timestep"] == ("float32", ("batch",))
    assert [(port.name, port.dtype) for port in manifest.outputs] == [("sample", "float32")]
    ports = {port.name: (port.dtype, port.shape) for port in exported("dit", "fused").model.manifest.inputs}
    assert ports["timestep"] == ports["class_labels"] == ("int64", ("batch",))


def test_float_layers_of_the_policy_stay_float(exported):
    made = exported("dit", "fused")
    assert set(linears_of(made.module)) == {"proj_out_1", "proj_out_2"}


def test_bits_follow_the_timestep_in_the_exported_model(exported):
    made = exported("dit", "fused")
    inputs, _ = made.call(batch=2, second=False)
    inputs = {name: np.repeat(value[:1], 2, axis=0) for name, value in inputs.items()}
    inputs["timestep"] = np.array([499, 500])
    quantizations = [node for node in graph_of(made.model).node if "HadamardQuantize" in node.op_type]
    codes = [node.output[0] for node in quantizations]
    got = open_session(made.model.path, optimize=False, values=codes).run(inputs)
    largest = [(np.abs(got[code][0]).max(), np.abs(got[code][1]).max()) for code in codes]
    assert (7, 127) in largest and (127, 127) in largest
    assert set(largest) == {(7, 127), (127, 127)}


def test_config_and_scheduler_travel_on(tiny_checkpoint, tmp_path, tiny_traced_once):
    model = export(tiny_checkpoint.folder, tmp_path / "out")
    assert model.config == tiny_checkpoint.config
    assert model.scheduler_config == tiny_checkpoint.scheduler_config
    assert model.manifest.checkpoint_sha256 == tiny_checkpoint.sha256
    assert OnnxModel.load(tmp_path / "out").manifest == model.manifest


def test_what_differs_from_pytorch_is_not_written(tiny_checkpoint, tmp_path, monkeypatch, tiny_traced_once):
    monkeypatch.setitem(check.LEAST_DB, "fused", 300.0)
    monkeypatch.setitem(check.WORST_DB, "fused", 300.0)
    with pytest.raises(Failed, match="differs from PyTorch"):
        export(tiny_checkpoint.folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_may_differ_as_much_as_it_differs_from_itself(monkeypatch, tmp_path):
    """A sine of a large multiple turns roundings into noise; a wrong factor is refused all the same."""
    inputs = {"x": torch.linspace(0.1, 1, 512)}

    def module(x, return_dict):
        return (torch.sin(x * 3e6),)

    class Runner:
        def __init__(self, factor):
            self.factor = factor

        def run(self, values):
            x = np.nextafter(values["x"], np.float32(2))
            return {check.OUTPUT: np.sin(x * np.float32(self.factor))}

    monkeypatch.setattr(check, "open_session", lambda path, optimize: Runner(3e6))
    found = Runner(3e6).run({"x": inputs["x"].numpy()})[check.OUTPUT]
    assert sqnr_db(module(inputs["x"], False)[0].numpy(), found) < check.LEAST_DB["fused"]
    check.check_results(tmp_path, module, {"a call": inputs}, "fused")
    with pytest.raises(Failed, match="differs from PyTorch"):
        check.check_results(tmp_path, module, {"a call": inputs}, "float")
    monkeypatch.setattr(check, "open_session", lambda path, optimize: Runner(2e6))
    with pytest.raises(Failed, match="differs from PyTorch"):
        check.check_results(tmp_path, module, {"a call": inputs}, "fused")


def test_an_unknown_form_is_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(Misuse, match="no form"):
        export(tiny_checkpoint.folder, tmp_path / "out", form="fp8")


def test_a_stranger_is_refused(tiny_checkpoint, tmp_path):
    class_name = "UNet2DConditionModel"
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint.folder, checkpoint)
    write_json(checkpoint / "config.json", {**tiny_checkpoint.config, "_class_name": class_name})
    policy = tiny_checkpoint.policy.model_copy(update={"model": class_name})
    policy.save(checkpoint / "policy.json")
    manifest = tiny_checkpoint.manifest.model_copy(update={"policy_sha256": policy.sha256})
    schema.save(manifest, checkpoint / "quantization_config.json")
    with pytest.raises(Misuse, match="unknown architecture"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_file_is_compared_with_pytorch_only_where_its_unpacked_weights_fit(
    tiny_checkpoint, tmp_path, monkeypatch, tiny_traced_once
):
    """The bodies unpack all weights: 48 x 192 of them count, not the words that hold them."""
    stage = sys.modules["dit2deploy.stages.export.export"]
    compared, news = [], []
    monkeypatch.setattr(stage.check, "check_results", lambda *_: compared.append(True))
    stop = progress.listen(lambda what, done, total: news.append(what) if total == 0 else None)
    try:
        for left, many in ((1 << 30, 1), (1 << 10, 1)):
            monkeypatch.setattr(stage, "require", lambda *_, left=left: left)
            stage.export(tiny_checkpoint.folder, tmp_path / "onnx")
            assert len(compared) == many
    finally:
        stop()
    assert any("not compared with PyTorch: it would take" in text for text in news)
