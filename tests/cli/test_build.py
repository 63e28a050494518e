"""`dit2deploy build --floats`: handed to every target, told in the bundle, refused where there are no halves."""

import pytest

from dit2deploy.artefacts.bundle import Bundle, Thresholds
from dit2deploy.cli import main
from tests.bundles import sources


def build(out, target: str) -> None:
    main(["build", str(sources().onnx), "--target", target, "--floats", "float16", "-q", "-o", str(out)])


def test_the_bundle_tells_the_type_of_the_activations(tmp_path):
    out = tmp_path / "bundle"
    with pytest.raises(SystemExit) as stopped:
        build(out, "ort-cuda")
        raise SystemExit(0)
    assert not stopped.value.code
    bundle = Bundle.load(out)
    assert bundle.target("ort-cuda").details["floats"] == "float16"
    assert bundle.thresholds("ort-cuda") == Thresholds.of_significand(11) != bundle.manifest.thresholds


def test_a_cpu_has_no_halves(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        build(tmp_path / "bundle", "ort-cpu")
    assert stopped.value.code == 2
    assert "target ort-cpu has no option floats" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
