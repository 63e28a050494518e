"""A bundle vouches for its files: what was changed, removed, added by a path trick or made by the future is refused."""

import json

import pytest

from dit2deploy.artefacts.bundle import MANIFEST, Bundle, BundleManifest, SizeRecord, TargetRecord
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_file


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    (folder / "ort-cpu").mkdir(parents=True)
    (folder / "ort-cpu" / "model.onnx").write_bytes(b"engine")
    (folder / "config.json").write_text("{}")
    manifest = BundleManifest(
        model="Net",
        family="net",
        created="2026-01-01T00:00:00+00:00",
        inputs=(),
        outputs=(),
        layers={},
        targets={
            "ort-cpu": TargetRecord(
                engines={"cpu": "ort-cpu/model.onnx"}, files=("ort-cpu/model.onnx",), weight_bytes=6
            )
        },
        size=SizeRecord(float32=12, parts={"packed": 6}),
        provenance={},
        sha256={name: sha256_of_file(folder / name) for name in ("ort-cpu/model.onnx", "config.json")},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


def _edit(folder, change):
    value = json.loads((folder / MANIFEST).read_text())
    change(value)
    (folder / MANIFEST).write_text(json.dumps(value))


def test_a_whole_bundle_loads(bundle):
    loaded = Bundle.load(bundle)
    assert loaded.manifest.size.ratio == 2
    assert loaded.target("ort-cpu").engines == {"cpu": "ort-cpu/model.onnx"}


def test_a_changed_file_is_named(bundle):
    (bundle / "ort-cpu" / "model.onnx").write_bytes(b"Engine")
    with pytest.raises(Misuse, match=r"model\.onnx.*hash mismatch"):
        Bundle.load(bundle)


def test_a_missing_file_is_named(bundle):
    (bundle / "config.json").unlink()
    with pytest.raises(Misuse, match=r"config\.json: no such file"):
        Bundle.load(bundle)


def test_a_missing_bundle_is_told(tmp_path):
    with pytest.raises(Misuse, match="no such file"):
        Bundle.load(tmp_path / "nowhere")


def test_a_target_that_is_not_there_is_told(bundle):
    with pytest.raises(Misuse, match="no engine for tensorrt"):
        Bundle.load(bundle).target("tensorrt")


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname"])
def test_no_file_outside_is_taken(bundle, name):
    _edit(bundle, lambda value: value["sha256"].update({name: "0" * 64}))
    with pytest.raises(Misuse, match="leads out"):
        Bundle.load(bundle)


def test_an_engine_without_a_hash_is_refused(bundle):
    _edit(bundle, lambda value: value["targets"]["ort-cpu"]["engines"].update(cpu="ort-cpu/other.onnx"))
    with pytest.raises(Misuse, match="does not vouch"):
        Bundle.load(bundle)


def test_a_newer_schema_is_told(bundle):
    _edit(bundle, lambda value: value.update(schema_version=99))
    with pytest.raises(Misuse, match="newer dit2deploy"):
        Bundle.load(bundle)
