"""Calibration sets hold the calls of a trajectory, are made again from their options, and are kept when they fit."""

import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from dit2deploy.artefacts.calibration_set import TENSORS, CalibrationSet
from dit2deploy.base import progress
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_file
from dit2deploy.models.flux import FLUX
from dit2deploy.models.load import load_transformer
from dit2deploy.nn.call import call_numpy
from dit2deploy.sampling import Scheduler
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.calibrate.calibrate import FIRST_SEED
from tests.variants import with_weights

module = sys.modules["dit2deploy.stages.calibrate.calibrate"]


@pytest.fixture(scope="module")
def model(tiny_dit_folder):
    return tiny_dit_folder


def test_a_set_holds_each_call_of_the_guided_trajectory(model, tmp_path):
    made = calibrate(model, tmp_path / "set", samples=5, steps=4, guidance=2.0)
    assert made.manifest.timesteps == tuple(Scheduler.load(model).timesteps(4).tolist())
    assert made.manifest.seeds == tuple(range(FIRST_SEED, FIRST_SEED + 5))
    first, second = made.call(0), made.call(1)
    assert {name: (value.shape, value.dtype) for name, value in first.items()} == {
        "hidden_states": ((10, 1, 8, 8), np.float32),
        "timestep": ((10,), np.int64),
        "class_labels": ((10,), np.int64),
    }
    assert first["class_labels"].tolist() == [0, 2, 4, 6, 8, 10, 10, 10, 10, 10]
    np.testing.assert_array_equal(first["hidden_states"][:5], first["hidden_states"][5:])
    for index in range(4):
        assert set(made.call(index)["timestep"]) == {made.manifest.timesteps[index]}

    # The second call is where the first leads, by the scheduler and the model.
    network, _ = load_transformer(model)
    with torch.no_grad():
        output = network(**{name: torch.from_numpy(value) for name, value in first.items()}).sample.numpy()
    guided = output[5:] + 2.0 * (output[:5] - output[5:])
    step = Scheduler.load(model).step(guided, made.manifest.timesteps[0], first["hidden_states"][:5], steps=4)
    np.testing.assert_allclose(second["hidden_states"][:5], step, atol=1e-5)


def test_labels_are_balanced_beyond_the_number_of_classes(model, tmp_path):
    made = calibrate(model, tmp_path / "set", samples=20, steps=1, guidance=1.0)
    assert np.bincount(made.call(0)["class_labels"]).tolist() == [2] * 10


def test_the_same_options_give_the_same_bytes_and_another_seed_others(model, tmp_path):
    hashes = [
        sha256_of_file(calibrate(model, tmp_path / name, samples=2, steps=2, seed=seed).folder / TENSORS)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_set_that_fits_is_kept_and_another_is_replaced(model, tmp_path):
    news = []
    stop = progress.listen(lambda what, done, total: news.append(what) if total == 0 else None)
    try:
        calibrate(model, tmp_path / "set", samples=2, steps=2)
        written = (tmp_path / "set" / TENSORS).stat().st_mtime_ns
        calibrate(model, tmp_path / "set", samples=2, steps=2)
        assert (tmp_path / "set" / TENSORS).stat().st_mtime_ns == written
        assert any("already holds" in text for text in news)
        assert len(calibrate(model, tmp_path / "set", samples=2, steps=3)) == 3
        (tmp_path / "set" / TENSORS).write_bytes(b"cut")
        assert len(calibrate(model, tmp_path / "set", samples=2, steps=3)) == 3
    finally:
        stop()


def test_other_families_get_random_inputs_and_the_manifest_says_so(tmp_path):
    FluxTransformer2DModel(**FLUX.tiny).save_pretrained(tmp_path / "flux")
    made = calibrate(tmp_path / "flux", tmp_path / "set", samples=2, steps=3)
    assert "random" in made.manifest.scheduler["_class_name"]
    assert made.manifest.timesteps == (999, 500, 0)
    np.testing.assert_allclose(made.call(1)["timestep"], 0.5)
    network, _ = load_transformer(tmp_path / "flux")
    network(**{name: torch.from_numpy(value) for name, value in made.call(0).items()})
    assert len(CalibrationSet.load(tmp_path / "set")) == 3


def test_a_transformer_without_its_scheduler_is_refused(model, tmp_path):
    shutil.copytree(model / "transformer", tmp_path / "alone")
    with pytest.raises(Misuse, match="no scheduler"):
        calibrate(tmp_path / "alone", tmp_path / "set")


def test_a_model_that_yields_nan_is_refused(model, tmp_path):
    weight = np.full((48, 1, 2, 2), np.nan, np.float16)
    broken = with_weights(model, tmp_path / "model", {"pos_embed.proj.weight": weight})
    with pytest.raises(Misuse, match="not finite at timestep"):
        calibrate(broken, tmp_path / "set", samples=1, steps=2)
    assert not (tmp_path / "set").exists()


def test_a_killed_run_goes_on_where_it_was_and_ends_in_the_same_bytes(model, tmp_path, monkeypatch):
    whole = calibrate(model, tmp_path / "whole", samples=2, steps=4)
    asked = []

    def counting(network, call):
        asked.append(int(call["timestep"][0]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return call_numpy(network, call)

    monkeypatch.setattr(module, "call_numpy", counting)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tmp_path / "set", samples=2, steps=4)
    assert not (tmp_path / "set").exists() and (tmp_path / "set.parts").is_dir()
    again = calibrate(model, tmp_path / "set", samples=2, steps=4)
    assert asked == [*whole.manifest.timesteps[:3], *whole.manifest.timesteps[2:]]
    assert sha256_of_file(again.folder / TENSORS) == sha256_of_file(whole.folder / TENSORS)
    assert not (tmp_path / "set.parts").exists()


def test_weights_on_disk_give_the_same_bytes(model, tmp_path, monkeypatch):
    whole = calibrate(model, tmp_path / "whole", samples=2, steps=3)
    monkeypatch.setattr(module, "weights_in_memory", lambda *_, **__: (0, 0))
    streamed = calibrate(model, tmp_path / "streamed", samples=2, steps=3)
    assert sha256_of_file(streamed.folder / TENSORS) == sha256_of_file(whole.folder / TENSORS)
