"""What ort-cpu writes: the kernels' layout, no bodies of ops with kernels, aligned weights in execution order."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dit2deploy.base.errors import Misuse
from dit2deploy.targets import kernel, ort_cpu, reference
from dit2deploy.targets.graph import bytes_by_part, float32_bytes, in_execution_order

OLDEST = Path(os.environ.get("D2D_OLD_ORT", "/nowhere"))


@pytest.fixture(scope="module")
def bundle(sample, tmp_path_factory):
    return sample.bundle(ort_cpu.TARGET, tmp_path_factory.mktemp("built") / "bundle")


@pytest.fixture(scope="module")
def model(bundle) -> ir.Model:
    return ir.load(bundle.path("ort-cpu/model.onnx"))


def test_weights_are_in_the_kernels_layout(model, sample):
    gemms = {node.op_type: node for node in model.graph if "Gemm" in node.op_type}
    assert {node.attributes["layout"].value for node in gemms.values()} == {kernel.KERNEL_ORDER}
    source = ir.load(sample.onnx.path).graph.initializers
    for op_type, fmt, name, k in (
        ("TernaryGemmLowRank", "ternary", "a.weight", 48),
        ("Int8Gemm", "int8", "b.weight", 40),
    ):
        words = gemms[op_type].inputs[2]
        want = kernel.relayout(fmt, source[name].const_value.numpy(), k)
        np.testing.assert_array_equal(words.const_value.numpy(), want)
        assert tuple(words.shape) == want.shape


def test_all_else_is_as_it_was(model, sample):
    source = ir.load(sample.onnx.path).graph
    assert [(node.op_type, node.name) for node in model.graph] == [(node.op_type, node.name) for node in source]
    for name, value in source.initializers.items():
        if not name.endswith(".weight"):
            np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), value.const_value.numpy())


def test_bodies_of_ops_with_kernels_are_gone(model):
    assert not model.functions


def test_weights_lie_in_execution_order_and_aligned(model):
    tensors = [value.const_value for value in in_execution_order(model.graph)]
    offsets = [tensor.offset for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    assert len(offsets) >= 4
    assert offsets == sorted(offsets) and all(offset % 64 == 0 for offset in offsets)


def test_bytes_are_told_by_part(bundle, model):
    parts = bundle.target("ort-cpu").details["parts"]
    assert parts == {**bytes_by_part(model), "graph": parts["graph"]}
    assert sum(parts.values()) == bundle.target("ort-cpu").weight_bytes
    weights = {
        fmt: 4 * np.prod(kernel.relayout_shape(fmt, n, k)) for fmt, n, k in (("ternary", 40, 48), ("int8", 48, 40))
    }
    assert {fmt: parts[fmt] for fmt in weights} == weights
    assert parts["low_rank"] == 4 * 4 * (40 + 48)
    assert parts["scales"] == 4 * (40 + 48 + 2)
    assert parts["float"] == 4 * (40 + 48)  # biases


def test_float32_bytes_are_those_of_the_unquantized_model(sample):
    assert float32_bytes(ir.load(sample.onnx.path)) == 4 * (2 * 40 * 48 + 40 + 48)


def test_another_form_is_refused(sample, tmp_path):
    onnx = type(sample.onnx)(sample.onnx.folder, sample.onnx.manifest.model_copy(update={"form": "qdq"}))
    with pytest.raises(Misuse, match="takes the fused form, this is qdq"):
        ort_cpu.build(onnx, root=tmp_path, options={})
    assert not list(tmp_path.iterdir())


def test_without_the_library_only_running_the_reference_is_left(monkeypatch):
    monkeypatch.setenv(kernel.LIBRARY_VARIABLE, "/nowhere.so")
    able = ort_cpu.availability()
    assert not able.can_build and not able.can_run and "/nowhere.so" in able.reason and able.cure
    assert reference.availability().can_run


def test_a_bundle_runs_where_the_package_holds_no_library(bundle, sample, monkeypatch):
    monkeypatch.setenv(kernel.LIBRARY_VARIABLE, "/nowhere.so")
    got = ort_cpu.open_engine(bundle).run(sample.inputs)["y"]
    np.testing.assert_allclose(got, sample.output, rtol=0, atol=2e-5 * abs(sample.output).max())


def test_threads_do_not_change_the_result(bundle, sample):
    one, two = (ort_cpu.open_engine(bundle, threads=threads).run(sample.inputs)["y"] for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_an_engine_opens_without_torch(bundle):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from dit2deploy import Bundle\n"
        "from dit2deploy.targets import by_name\n"
        "import numpy as np\n"
        f"bundle = Bundle.load({str(bundle.folder)!r})\n"
        "got = by_name('ort-cpu').open(bundle).run({'x': np.ones((2, 5, 48), np.float32)})\n"
        "print(got['y'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.stdout.strip() == "(2, 5, 48)", done.stderr


@pytest.mark.skipif(not OLDEST.is_dir(), reason="$D2D_OLD_ORT names no folder with onnxruntime 1.18")
def test_the_oldest_onnxruntime_runs_it_too(bundle, sample, tmp_path):
    """With inner values, which take another way there: links instead of a folder option."""
    np.save(tmp_path / "x.npy", sample.inputs["x"])
    code = (
        "import numpy as np, onnxruntime\n"
        "assert onnxruntime.__version__.startswith('1.18.'), onnxruntime.__version__\n"
        "from dit2deploy import Bundle\n"
        "from dit2deploy.targets import by_name\n"
        f"runner = by_name('ort-cpu').open(Bundle.load({str(bundle.folder)!r}), values=('a.y',))\n"
        f"got = runner.run({{'x': np.load({str(tmp_path / 'x.npy')!r})}})\n"
        f"np.savez({str(tmp_path / 'y.npz')!r}, **got)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(str(OLDEST)))
    assert done.returncode == 0, done.stderr
    got = np.load(tmp_path / "y.npz")
    np.testing.assert_allclose(got["y"], sample.output, rtol=0, atol=2e-5 * abs(sample.output).max())
    np.testing.assert_allclose(got["a.y"], sample.first, rtol=0, atol=2e-6 * abs(sample.first).max())


def test_a_bundle_without_its_library_is_refused(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    (folder / "ort-cpu" / kernel.LIBRARY_NAME).unlink()
    with pytest.raises(Misuse, match="no such file"):
        type(bundle).load(folder)


def _environment(*first: str) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join((*first, root))}
