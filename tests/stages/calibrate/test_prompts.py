"""Calibration by prompts: what the set holds is what the pipeline's transformer was given, and it can be used."""

import json
import math
import shutil

import diffusers
import numpy as np
import pytest
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.base import progress
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import TensorFile
from dit2deploy.cli import main
from dit2deploy.models.flux import FLUX
from dit2deploy.models.pipeline import recording
from dit2deploy.pipeline import compile
from dit2deploy.stages.calibrate import calibrate
from tests import pipelines
from tests.packing import tiny_module

PROMPTS = "a cat\n\n  a red dog and a cat \n"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return pipelines.flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def made(flux, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "calibration"
    return calibrate(flux, out, prompts=prompts, steps=3, guidance=2.0, height=8, width=16)


def test_the_set_holds_the_text_encoders_outputs(made, flux):
    """Text embeddings against those that the pipeline's own encoders give for the same prompts."""
    assert made.manifest.prompts == ("a cat", "a red dog and a cat")
    assert made.manifest.size == (8, 16)
    pipe = diffusers.FluxPipeline.from_pretrained(flux)
    with torch.no_grad():
        text, pooled, ids = pipe.encode_prompt(list(made.manifest.prompts), None)
    for index in range(len(made)):
        call = made.call(index)
        np.testing.assert_array_equal(call["encoder_hidden_states"], text.numpy())
        np.testing.assert_array_equal(call["pooled_projections"], pooled.numpy())
        np.testing.assert_array_equal(call["txt_ids"], ids.numpy())
        np.testing.assert_array_equal(call["guidance"], np.full(2, 2.0, np.float32))
    assert not np.array_equal(made.call(0)["encoder_hidden_states"][0], made.call(0)["encoder_hidden_states"][1])


def test_the_set_lies_on_a_trajectory(made):
    """Latents go on from step to step by the scheduler, and timesteps fall."""
    latents = made.tensors.read("hidden_states")
    assert latents.shape == (3, 2, 4 * 8, 8)
    assert made.manifest.timesteps == tuple(sorted(made.manifest.timesteps, reverse=True))
    assert 0 < made.manifest.timesteps[-1] < made.manifest.timesteps[0] <= 1000
    times = made.tensors.read("timestep")[:, 0]
    assert tuple(np.floor(1000 * times + 0.01).astype(int)) == made.manifest.timesteps
    assert 0.9 < latents[0].std() < 1.1 and not np.array_equal(latents[0], latents[1])


def test_rounded_timesteps_of_older_sets_are_read_right(made, tmp_path):
    """Steps of FLUX lie between integers: the nearest one may be in the next timestep group."""
    folder = shutil.copytree(made.folder, tmp_path / "set")
    manifest = json.loads((folder / "manifest.json").read_text())
    rounded = [round(1000 * float(time)) for time in made.tensors.read("timestep")[:, 0]]
    assert rounded != manifest["timesteps"]  # else nothing is shown here
    for told, timesteps in ((rounded, made.manifest.timesteps), (manifest["timesteps"], made.manifest.timesteps)):
        (folder / "manifest.json").write_text(json.dumps(manifest | {"timesteps": told}))
        assert CalibrationSet.load(folder).manifest.timesteps == timesteps
    assert CalibrationSet.load(folder).sha256 == made.sha256
    (folder / "manifest.json").write_text(json.dumps(manifest | {"timesteps": [1, 2, 3]}))
    with pytest.raises(Misuse, match="not those of its calls") as caught:
        CalibrationSet.load(folder)
    assert "dit2deploy calibrate" in caught.value.cure


def test_the_same_set_is_kept_and_another_is_made(made, flux, prompts, tmp_path):
    settings = {"steps": 3, "guidance": 2.0, "height": 8, "width": 16}
    before = made.tensors.path.stat().st_mtime_ns
    assert calibrate(flux, made.folder, prompts=prompts, **settings).tensors.path.stat().st_mtime_ns == before
    (tmp_path / "other.txt").write_text("a dog\na cat\n")
    shutil.copytree(made.folder, tmp_path / "set")
    other = calibrate(flux, tmp_path / "set", prompts=tmp_path / "other.txt", **settings)
    assert other.sha256 != made.sha256 and CalibrationSet.load(tmp_path / "set").manifest.prompts == ("a dog", "a cat")


def test_wan_is_recorded_with_its_frames(prompts, tmp_path):
    folder = pipelines.wan(tmp_path / "wan")
    made = calibrate(folder, tmp_path / "set", prompts=prompts, steps=2, guidance=3.0, height=32, width=32)
    assert len(made) == 4  # each step asks with the prompt and without
    assert made.call(0)["hidden_states"].shape[:2] == (2, 4)
    assert made.call(0)["encoder_hidden_states"].shape[::2] == (2, 32)
    assert not np.array_equal(made.call(0)["encoder_hidden_states"], made.call(1)["encoder_hidden_states"])


def test_compile_calibrates_by_prompts_and_other_prompts_make_the_set_anew(flux, tmp_path, monkeypatch, capsys):
    def stop(*_arguments, **_options):
        raise Misuse("here the calibration set is there.", "Look at it.")

    monkeypatch.setattr("dit2deploy.stages.search.search", stop)
    first, moved, other = (tmp_path / name for name in ("first.txt", "moved.txt", "other.txt"))
    for path, text in ((first, "a cat\n"), (moved, "\na cat"), (other, "a dog\n")):
        path.write_text(text)

    def compiled(*options) -> tuple[CalibrationSet, str]:
        with pytest.raises(SystemExit):
            main(
                [
                    "compile",
                    str(flux),
                    "--samples",
                    "1",
                    "--steps",
                    "2",
                    "-o",
                    str(tmp_path / "out"),
                    *map(str, options),
                ]
            )
        printed = capsys.readouterr().err
        assert "here the calibration set is there" in printed
        return CalibrationSet.load(tmp_path / "out.work" / "calibration"), printed

    size = ("--height", 8, "--width", 16)
    made, printed = compiled("--prompts", first, *size)
    assert made.manifest.prompts == ("a cat",) and made.manifest.size == (8, 16) and "warning" not in printed
    again, printed = compiled("--prompts", moved, *size)
    assert again.sha256 == made.sha256 and "calibrate: done before, kept" in printed
    assert compiled("--prompts", other, *size)[0].manifest.prompts == ("a dog",)
    random, printed = compiled()
    assert not random.manifest.prompts and "warning: without prompts" in printed and "--prompts FILE" in printed
    for wrong in ({"prompts": first, "calibration": made.folder}, {"height": 8}):
        with pytest.raises(Misuse, match=r"^compile: "):
            compile(flux, tmp_path / "out", **wrong)


@pytest.mark.parametrize("command", ["calibrate", "compile"])
def test_a_dry_run_by_prompts_tells_the_least(command, flux, prompts, tmp_path, capsys):
    options = ["--prompts", prompts, "--steps", 2, "--dry-run", "--json", "-o", tmp_path / "out"]
    main([command, str(flux), *map(str, options)])
    printed = capsys.readouterr()
    assert not list(tmp_path.iterdir())
    found = {one["stage"]: one for one in json.loads(printed.out)["estimates"]}
    whole = sum(
        4 * math.prod(TensorFile(path).shape(name)) for path in flux.rglob("*.safetensors") for name in TensorFile(path)
    )
    assert found["calibrate"]["memory"] > whole and found["calibrate"]["seconds"] > 0
    assert "text encoders" in found["calibrate"]["left_out"]
    assert list(found) == (["calibrate"] if command == "calibrate" else ["calibrate", "quantize"])


def test_a_missing_component_is_named(flux, prompts, tmp_path):
    folder = shutil.copytree(flux, tmp_path / "flux")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(Misuse, match="names the component text_encoder_2, which is not there"):
        calibrate(folder, tmp_path / "set", prompts=prompts)
    assert not (tmp_path / "set").exists()


def test_a_pipeline_without_text_encoders_takes_no_prompts(tiny_dit_folder, prompts, tmp_path):
    with pytest.raises(Misuse, match="is asked by classes"):
        calibrate(tiny_dit_folder, tmp_path / "set", prompts=prompts)


def test_pixart_is_recorded_with_the_mask_of_its_captions(prompts, tmp_path):
    folder = pipelines.pixart(tmp_path / "pixart")
    made = calibrate(folder, tmp_path / "set", prompts=prompts, steps=2, guidance=3.0, height=16, width=16)
    pipe = diffusers.PixArtSigmaPipeline.from_pretrained(folder)
    with torch.no_grad():
        text, mask, without, mask_without = pipe.encode_prompt(list(made.manifest.prompts))
    assert mask.sum(1).tolist() == [3, 7]  # words and the end of the text
    for call in (made.call(0), made.call(1)):
        assert call["hidden_states"].shape == (4, 4, 8, 8) and call["encoder_attention_mask"].dtype == np.int64
        np.testing.assert_array_equal(call["encoder_attention_mask"], torch.cat([mask_without, mask]).numpy())
        np.testing.assert_array_equal(call["encoder_hidden_states"], torch.cat([without, text]).numpy())


@pytest.mark.parametrize("name", ("flux", "pixart"))
def test_batches_of_prompts_make_the_same_set(name, tmp_path, monkeypatch):
    """Three prompts at once against two and one: PixArt asks without and with each prompt in one call."""
    folder = getattr(pipelines, name)(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nred\n")
    settings = {"prompts": tmp_path / "prompts.txt", "steps": 2, "guidance": 3.0, "height": 16, "width": 16}
    at_once = calibrate(folder, tmp_path / "at-once", **settings)
    monkeypatch.setattr("dit2deploy.models.pipeline.BATCH", 2)
    told: list[tuple] = []
    stop = progress.listen(lambda *news: told.append(news))
    parts = calibrate(folder, tmp_path / "parts", **settings)
    stop()
    assert [news[1:] for news in told if news[0] == "calibrate: prompts"] == [(0, 2), (1, 2), (2, 2)]
    assert parts.manifest.timesteps == at_once.manifest.timesteps and set(parts.tensors) == set(at_once.tensors)
    for tensor in at_once.tensors:
        np.testing.assert_allclose(parts.tensors.read(tensor), at_once.tensors.read(tensor), atol=1e-4, err_msg=tensor)


def test_what_the_family_has_no_input_for_is_named():
    module = tiny_module(FLUX)
    inputs = FLUX.inputs(module.config, batch=2, seed=0)
    with recording(module, FLUX) as calls, torch.no_grad():
        module(**inputs, return_dict=False)
        with pytest.raises(Misuse, match="the pipeline passes controlnet_block_samples"):
            module(**inputs, controlnet_block_samples=[torch.zeros(1)])
    assert len(calls) == 1


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\xff"], ids=["missing", "empty", "blank", "binary"])
def test_a_file_without_prompts_is_refused(content, flux, tmp_path):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Misuse, match=r"prompts\.txt"):
        calibrate(flux, tmp_path / "set", prompts=path)
