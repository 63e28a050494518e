"""Models by their name on the hub, against a stand-in of its cache: refs, snapshots of links, and the blobs behind."""

import json
import shutil

import huggingface_hub
import pytest

from dit2deploy.base.files import TensorFile, write_json, write_tensors
from dit2deploy.cli import main
from dit2deploy.models.hub import local, pinned
from dit2deploy.models.load import open_model
from dit2deploy.stages.build import build
from tests.bundles import engines, sources

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Of org/tiny at COMMIT, its weights in two shards; nothing can be fetched."""
    root = tmp_path / "hub" / "models--org--tiny"
    blobs, snapshot = root / "blobs", root / "snapshots" / COMMIT
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    blobs.mkdir()
    pipeline = sources().pipeline
    weights = TensorFile(next((pipeline / "transformer").glob("*.safetensors")))
    half, index = len(weights) // 2, {}
    for number, names in enumerate((list(weights)[:half], list(weights)[half:])):
        shard = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        write_tensors(blobs / shard, {name: weights.read(name) for name in names})
        index |= dict.fromkeys(names, shard)
    (blobs / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    files = {f"transformer/{blob.name}": blob for blob in blobs.iterdir()}
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        files[name] = pipeline / name
    for name, blob in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_name_is_the_snapshot_in_the_cache(cache):
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        assert local(name) == cache and pinned(local(name)) == f"org/tiny@{COMMIT}"
    assert pinned(cache / "transformer") == f"org/tiny@{COMMIT}"
    opened, plain = open_model(cache), open_model(sources().pipeline)
    assert len(opened.tensors.files) == 2 and set(opened.tensors) == set(plain.tensors)
    assert (opened.tensors.read("proj_out_1.weight") == plain.tensors.read("proj_out_1.weight")).all()


def test_what_is_here_is_not_looked_for_elsewhere(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert str(local("org/tiny")) == "org/tiny" and pinned(tmp_path) == ""
    assert local(tmp_path / "gone") == tmp_path / "gone"


@pytest.mark.parametrize("name", ["org/other", f"org/tiny@{OTHER}"])
def test_what_the_hub_does_not_give_is_told(name, cache, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", name, "-o", str(tmp_path / "out")])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and f"error: {name}: is no folder here" in printed and "OWNER/NAME" in printed


def test_a_stage_takes_a_name_and_the_bundle_keeps_the_revision(cache, capsys, tmp_path):
    main(["calibrate", "org/tiny", "--samples", "1", "--steps", "2", "-o", str(tmp_path / "set"), "-q"])
    assert "2 calls of DiTTransformer2DModel" in capsys.readouterr().out
    exported = shutil.copytree(sources().onnx, tmp_path / "onnx")
    manifest = json.loads((exported / "manifest.json").read_text())
    write_json(exported / "manifest.json", {**manifest, "checkpoint": str(tmp_path / "gone")})  # of the unsharded model
    made = build(exported, tmp_path / "bundle", targets=engines()[:1], model=local("org/tiny"))
    assert made.manifest.provenance["model_hub"] == f"org/tiny@{COMMIT}"
    assert made.manifest.provenance["model_path"] == str(cache)
