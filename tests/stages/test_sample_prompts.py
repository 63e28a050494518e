"""Prompts through real pipelines: full precision and the engine from the same seeds, as a picture and as a clip."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.bundle import QUALITY, REPORT
from dit2deploy.artefacts.checkpoint import MANIFEST
from dit2deploy.base.errors import Misuse
from dit2deploy.cli import main
from dit2deploy.evaluate.fidelity import sqnr_db
from dit2deploy.models.load import load_transformer, open_model
from dit2deploy.stages.build import build
from dit2deploy.stages.export import export
from dit2deploy.stages.sample import sample_prompts
from tests import pipelines
from tests.bundles import engines
from tests.packing import pack_checkpoint, policy_of

TARGET = engines()[-1]
SIZES = {
    "flux": {"height": 8, "width": 8},
    "pixart": {"height": 16, "width": 16},
    "wan": {"height": 32, "width": 32, "frames": 5},
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na red dog\n")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name): the folder of a pipeline and that of a bundle of its transformer, int8."""
    root, done = tmp_path_factory.mktemp("pipelines"), {}

    def get(name: str):
        if name not in done:
            folder = getattr(pipelines, name)(root / name)
            module, family = load_transformer(folder)
            policy = policy_of(family, module, weight="int8", bits=(8,))
            checkpoint = pack_checkpoint(root / f"{name}-checkpoint", module, policy, half=False)
            told = {"model_path": str(folder), "model_sha256": open_model(folder).sha256}
            schema.save(checkpoint.manifest.model_copy(update=told), checkpoint.folder / MANIFEST)
            onnx = export(checkpoint.folder, root / f"{name}-onnx")
            done[name] = folder, build(onnx.folder, root / f"{name}-bundle", targets=[TARGET]).folder
        return done[name]

    return get


@pytest.mark.parametrize("name", SIZES)
def test_both_draw_the_same_prompts_from_the_same_seeds(name, made, prompts, tmp_path):
    _, bundle = made(name)
    settings = {"prompts": prompts, "steps": 2, "guidance": 3.0, "target": TARGET, **SIZES[name]}
    drawn = sample_prompts(bundle, tmp_path / "picture.png", **settings)
    full, engine = drawn["full_precision"], drawn["engine"]
    assert (
        full.shape == engine.shape == {"flux": (2, 8, 8, 3), "pixart": (2, 16, 16, 3), "wan": (2, 5, 32, 32, 3)}[name]
    )
    assert not np.array_equal(full, engine)
    # 8 bits leave the pictures alike; another prompt or another seed is another picture.
    likeness = sqnr_db(full - full.mean(), engine - full.mean())
    assert likeness > 10 and likeness > sqnr_db(full - full.mean(), engine[::-1] - full.mean()) + 6
    picture = np.asarray(Image.open(tmp_path / "picture.png"))
    assert picture.shape[2] == 3 and picture.std() > 1
    if name == "wan":
        clip = Image.open(tmp_path / "picture.webp")
        assert (clip.size, clip.n_frames) == ((64, 64), 5)
        clip.seek(3)
        frame = np.asarray(clip.convert("RGB"))
        np.testing.assert_array_equal(frame[:32, 32:], np.rint(engine[0, 3] * 255).astype(np.uint8))
    else:
        assert not (tmp_path / "picture.webp").exists()


def test_the_pairs_are_measured_and_what_is_missing_is_named(made, prompts, capsys, monkeypatch, tmp_path):
    """PSNR needs no package; the others' weights are not here."""
    _, bundle = made("flux")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    words = ("--steps", "2", "--guidance", "3", "--height", "8", "--width", "8", "--clip", str(tmp_path))
    main(["evaluate", str(bundle), "--prompts", str(prompts), *words])
    printed = capsys.readouterr()
    found = json.loads((bundle / QUALITY).read_text())
    drawn = sample_prompts(
        bundle, tmp_path / "x.png", prompts=prompts, steps=2, guidance=3.0, target=TARGET, height=8, width=8
    )
    pairs = list(zip(drawn["full_precision"], drawn["engine"], strict=True))
    want = np.mean([-10 * np.log10(np.mean((full - engine) ** 2)) for full, engine in pairs])
    assert found["metrics"]["psnr_db"]["pair"] == pytest.approx(want, rel=1e-3) and found["samples"] == 2
    for name in ("lpips", "clip_score", "fid"):
        assert found["metrics"][name]["reason"] and found["metrics"][name]["cure"]
        assert re.search(rf"not measured: .*{re.escape(found['metrics'][name]['title'])}", printed.err)
    assert "not measured" in printed.out
    main(["report", str(bundle), "-q"])
    assert "PSNR to full precision, dB" in (bundle / REPORT).read_text()


def test_another_model_is_refused(made, prompts, tmp_path):
    _, bundle = made("flux")
    other, _ = made("wan")
    with pytest.raises(Misuse, match="is not the model that"):
        sample_prompts(bundle, tmp_path / "x.png", prompts=prompts, model=other, target=TARGET)
    assert list(tmp_path.iterdir()) == []


def test_the_report_shows_both(made, prompts):
    """`dit2deploy report --prompts`: the pictures are drawn and lie in the page."""
    _, bundle = made("flux")
    arguments = ["report", str(bundle), "--prompts", str(prompts), "--steps", "1", "--height", "8", "--width", "8"]
    main([*arguments, "--target", TARGET, "-q"])
    page = (bundle / REPORT).read_text()
    assert page.count("data:image/png;base64,") >= 2 and "Full precision" in page
    assert (bundle / "samples.png").is_file()
