"""Stage build: a whole bundle or none, with recorded steps, hashes and provenance."""

import json
from pathlib import Path

import numpy as np
import pytest

from dit2deploy.artefacts.bundle import MANIFEST, Bundle
from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.base.errors import Misuse
from dit2deploy.models.load import load_transformer
from dit2deploy.nn.call import call_numpy
from dit2deploy.nn.convert import load_quantized
from dit2deploy.stages.build import build
from dit2deploy.targets import TARGETS, Availability, kernel
from tests.bundles import engines, sources


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    made = sources()
    out = tmp_path_factory.mktemp("build") / "bundle"
    return build(made.onnx, out, targets=engines(), calibration=made.calibration, model=made.pipeline)


def test_the_bundle_is_whole_and_vouches_for_every_file(bundle):
    opened = Bundle.load(bundle.folder)
    there = {str(path.relative_to(bundle.folder)) for path in bundle.folder.rglob("*") if path.is_file()}
    assert there == {*opened.manifest.sha256, MANIFEST}
    assert list(opened.manifest.targets) == engines()
    assert not list(bundle.folder.parent.glob(".*"))


def test_steps_are_recorded_as_pytorch_computes_them(bundle):
    recorded = bundle.reference()
    assert set(recorded) == {
        "input.hidden_states",
        "input.timestep",
        "input.class_labels",
        "quantized",
        "full_precision",
    }
    timesteps = recorded["input.timestep"]
    assert len(timesteps) == 4 and (np.diff(timesteps[:, 0]) < 0).all()
    call = {name: recorded[f"input.{name}"][1] for name in ("hidden_states", "timestep", "class_labels")}
    quantized = load_quantized(Checkpoint.load(sources().checkpoint))
    full, _ = load_transformer(sources().pipeline)
    for name, module in (("quantized", quantized), ("full_precision", full)):
        want = call_numpy(module, call)
        np.testing.assert_allclose(recorded[name][1], want, atol=1e-5 * abs(want).max())
    assert np.abs(recorded["quantized"] - recorded["full_precision"]).max() > 1e-3


def test_sizes_and_provenance(bundle):
    size, made = bundle.manifest.size, bundle.manifest.provenance
    parameters = sum(p.numel() for p in load_transformer(sources().pipeline)[0].parameters())
    assert size.float32 == 4 * parameters
    assert {"ternary", "int8", "low_rank", "scales", "float"} == set(size.parts)
    assert sum(size.parts.values()) < size.float32 / 2
    assert made["model_path"] == str(sources().pipeline.resolve())
    assert made["checkpoint_sha256"] == Checkpoint.load(sources().checkpoint).sha256
    assert made["policy_sha256"] == bundle.policy.sha256
    assert bundle.scheduler_config["_class_name"] == "DDIMScheduler"
    assert bundle.config["_class_name"] == bundle.manifest.model


def test_without_sources_size_comes_from_the_onnx_file(bundle, tmp_path):
    """The model's own count holds biases that the model lacks and constants; both agree within 2 %."""
    alone = build(sources().onnx, tmp_path / "bundle", targets=["reference"])
    assert not (alone.folder / "reference" / "steps.safetensors").exists()
    assert alone.manifest.size.float32 == pytest.approx(bundle.manifest.size.float32, rel=0.02)


def test_a_target_that_cannot_be_built_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(kernel.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(Misuse, match=r"ort-cpu cannot be built here: .*none.so") as caught:
        build(sources().onnx, tmp_path / "bundle", targets=["reference", "ort-cpu"])
    assert caught.value.cure
    assert not list(tmp_path.iterdir())


def test_a_build_that_fails_keeps_the_old_bundle(tmp_path, monkeypatch):
    old = build(sources().onnx, tmp_path / "bundle", targets=["reference"])
    before = (old.folder / MANIFEST).read_bytes()
    with pytest.raises(Misuse, match="has no option"):
        build(sources().onnx, old.folder, targets=["reference"], options={"reference": {"colour": 1}})
    assert (old.folder / MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_unknown_and_missing_targets_are_refused(tmp_path):
    with pytest.raises(Misuse, match="unknown target 'npu'"):
        build(sources().onnx, tmp_path / "bundle", targets=["npu"])
    with pytest.raises(Misuse, match="no target is named"):
        build(sources().onnx, tmp_path / "bundle", targets=[])


def test_sources_that_do_not_fit_are_refused(tmp_path):
    made = sources()
    onnx = tmp_path / "onnx"
    _copy(made.onnx, onnx)
    manifest = json.loads((onnx / "manifest.json").read_text())
    (onnx / "manifest.json").write_text(json.dumps({**manifest, "checkpoint_sha256": "0" * 64}))
    with pytest.raises(Misuse, match="is not the checkpoint that"):
        build(onnx, tmp_path / "bundle", targets=["reference"])
    with pytest.raises(Misuse, match="is no float model"):
        build(made.onnx, tmp_path / "bundle", targets=["reference"], float_onnx=made.onnx)
    pipeline = tmp_path / "pipeline"
    _copy(made.pipeline, pipeline)
    weights = next(pipeline.rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Misuse, match="is not the model that"):
        build(made.onnx, tmp_path / "bundle", targets=["reference"], model=pipeline)
    assert not (tmp_path / "bundle").exists()


def test_every_target_states_availability_without_raising():
    assert all(isinstance(target.availability(), Availability) for target in TARGETS)


def _copy(source: Path, out: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            to = out / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
