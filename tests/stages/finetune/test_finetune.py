"""Training lowers the error to the teacher, writes what it trained, goes on after a kill, and refuses strangers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.checkpoint import TENSORS, Checkpoint
from dit2deploy.artefacts.policy import MonarchGrid
from dit2deploy.base import progress
from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.base.files import write_tensors
from dit2deploy.cli import main
from dit2deploy.models.flux import FLUX
from dit2deploy.models.load import load_transformer, open_model
from dit2deploy.models.sd3 import SD3
from dit2deploy.nn.convert import load_quantized
from dit2deploy.nn.train_linear import INSIDE, trainable_linears
from dit2deploy.sampling import Scheduler
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.finetune import Settings, finetune
from dit2deploy.stages.finetune.examples import Images, answer, fresh
from dit2deploy.stages.finetune.finetune import _student
from dit2deploy.stages.finetune.selective import phases
from dit2deploy.stages.finetune.training import Training, packed
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.search import search
from tests import packing
from tests.variants import with_weights

TINY = Settings(steps=6, batch=4, trajectories=2, ema=0.5, learning_rate=0.01, branch_learning_rate=0.003)


@pytest.fixture(scope="module")
def model(tiny_dit_folder) -> Path:
    return tiny_dit_folder


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory) -> CalibrationSet:
    return calibrate(model, tmp_path_factory.mktemp("calibration") / "set", samples=2, steps=3)


@pytest.fixture(scope="module")
def checkpoint(model, tiny_policy, calibration, tmp_path_factory) -> Checkpoint:
    return quantize(model, tiny_policy, calibration, tmp_path_factory.mktemp("checkpoint") / "set")


@pytest.fixture(scope="module")
def images(model, tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "images.safetensors"
    pixels = rng.standard_normal((5, 1, 8, 8)).astype(np.float32)
    write_tensors(path, {"images": pixels, "labels": rng.integers(10, size=5)})
    return path


@pytest.fixture(scope="module")
def held_out(model, calibration):
    teacher, _ = load_transformer(model)
    found = fresh(teacher, open_model(model), calibration, count=2, seed=99)
    return {name: torch.from_numpy(value) for name, value in found.items()}


def error(network: torch.nn.Module, held_out: dict[str, torch.Tensor]) -> float:
    inputs = {name: value for name, value in held_out.items() if name != "target"}
    with torch.no_grad():
        return (answer(network, inputs) - held_out["target"]).square().mean().item()


@pytest.mark.parametrize("trained", ["all", "branch"])
def test_training_lowers_the_error_on_trajectories_it_never_saw(
    model, checkpoint, calibration, held_out, tmp_path, trained
):
    settings = dataclasses.replace(TINY, steps=40, trained=trained, ema=0.8, batch=8)
    made = finetune(model, checkpoint, tmp_path / "out", calibration=calibration, settings=settings)
    before, after = error(load_quantized(checkpoint), held_out), error(load_quantized(made), held_out)
    assert after < (0.8 if trained == "all" else 0.95) * before
    assert made.policy == checkpoint.policy and list(made.tensors) == list(checkpoint.tensors)
    changed = {name for name in made.tensors if (made.tensors.read(name) != checkpoint.tensors.read(name)).any()}
    quantized = {name for name, layer in made.policy.layers.items() if layer.is_quantized}
    assert {name.rpartition(".")[0] for name in changed} <= quantized
    suffixes = {name.rpartition(".")[2] for name in changed}
    assert suffixes == {"weight_scale", "bias", "up", "down"} | ({"weight"} if trained == "all" else set())
    journal = made.manifest.training
    assert journal["steps"] == 40 and journal["checkpoint_sha256"] == checkpoint.sha256
    assert journal["losses"][-1][0] == 40 and not (tmp_path / "out.parts").exists()


def test_a_monarch_branch_is_trained_while_the_codes_stay(model, tiny_policy, calibration, held_out, tmp_path):
    """TreeQ's PEFT (methods.md 4.3): GMB of the parameters of rank 4, the base frozen."""
    sides = {"low_rank": 0, "monarch": MonarchGrid(2, 2, 2), "branch_init": "refit"}
    layers = {
        name: layer.model_copy(update=sides) if layer.low_rank else layer for name, layer in tiny_policy.layers.items()
    }
    policy = tiny_policy.model_copy(update={"layers": layers})
    start = quantize(model, policy, calibration, tmp_path / "start")
    settings = dataclasses.replace(TINY, steps=40, trained="branch", ema=0.8, batch=8)
    made = finetune(model, start, tmp_path / "out", calibration=calibration, settings=settings)
    assert error(load_quantized(made), held_out) < 0.95 * error(load_quantized(start), held_out)
    changed = {name for name in made.tensors if (made.tensors.read(name) != start.tensors.read(name)).any()}
    assert {name.rpartition(".")[2] for name in changed} == {"weight_scale", "bias", "monarch_down", "monarch_up"}
    assert {name.rpartition(".")[0] for name in changed if "monarch" in name} == {
        name for name, layer in layers.items() if layer.monarch
    }


def test_selective_training_leaves_the_frozen_layers_bit_for_bit(model, checkpoint, calibration, held_out, tmp_path):
    """Ranks of errors are checked against outputs taken by hand; the phases are the layers that QuEST names."""
    settings = dataclasses.replace(TINY, steps=40, trained="selective", ema=0.8, batch=8)
    made = finetune(model, checkpoint, tmp_path / "out", calibration=calibration, settings=settings)
    assert error(load_quantized(made), held_out) < 0.95 * error(load_quantized(checkpoint), held_out)
    temporal, worst = map(set, made.manifest.training["phases"])
    quantized = [name for name, layer in made.policy.layers.items() if layer.is_quantized]
    assert temporal == {name for name in quantized if ".norm1." in name}
    candidates = [name for name in quantized if ".attn1." in name or name.endswith("ff.net.2")]
    assert worst < set(candidates) and len(worst) == len(candidates) // 2
    changed = {name for name in made.tensors if (made.tensors.read(name) != checkpoint.tensors.read(name)).any()}
    assert {name.rpartition(".")[0] for name in changed} == temporal | worst
    assert {name for name in made.tensors if name.rpartition(".")[0] not in temporal | worst}.isdisjoint(changed)


def test_layers_are_chosen_by_the_error_of_their_outputs(model, checkpoint, calibration, held_out):
    teacher, family = load_transformer(model)
    student = _student(model, checkpoint, calibration)
    _, worst = phases(student, teacher, family, {name: value.numpy() for name, value in held_out.items()}, calls=False)
    rows = np.linspace(0, len(held_out["target"]) - 1, 32).round().astype(int)
    seen: list[dict[str, torch.Tensor]] = [{}, {}]
    for network, outputs in zip((teacher, student), seen, strict=True):
        for name, layer in network.named_modules():
            layer.register_forward_hook(lambda m, a, y, name=name, outputs=outputs: outputs.update({name: y}))
        with torch.no_grad():
            answer(network, {name: value[rows] for name, value in held_out.items() if name != "target"})
    ratios = {
        name: float((seen[1][name] - seen[0][name]).square().sum() / seen[0][name].square().sum())
        for name, layer in checkpoint.policy.layers.items()
        if layer.is_quantized and (".attn1." in name or name.endswith("ff.net.2"))
    }
    assert min(ratios[name] for name in worst) >= max(ratios[name] for name in ratios.keys() - worst)


def test_the_student_starts_as_the_checkpoint_and_its_packed_layers_run_as_it_does(
    model, checkpoint, calibration, held_out
):
    student = _student(model, checkpoint, calibration)
    start = error(load_quantized(checkpoint, form="qdq"), held_out)
    assert error(student, held_out) == pytest.approx(start, rel=1e-4)
    training = Training(student, TINY, torch.Generator())
    for name, tensors in packed(training).items():
        for suffix, value in tensors.items():
            np.testing.assert_array_equal(value, checkpoint.tensors.read(f"{name}.{suffix}"))


@pytest.mark.parametrize(
    ("options", "permutation"),
    [
        ({"smoothing": 0.6, "branch_init": "residual"}, "none"),
        ({"smoothing": 0.6, "branch_init": "weight"}, "none"),
        ({"smoothing": 0.6, "branch_init": "salient"}, "none"),
        ({"branch_init": "weight", "clip": "gaussian", "gain": "clip", "activation_bits": 2}, "none"),
        ({"branch_init": "weight"}, "zigzag"),
    ],
    ids=("smoothed", "branch first", "salient", "gain", "permuted"),
)
def test_the_student_starts_at_the_weights_that_were_rounded(
    model, calibration, held_out, tmp_path, options, permutation
):
    """Weights were rounded to nearest: next to none starts at the border of its cell, where a wrong one is clipped to;
    and the first loss is the checkpoint's."""
    policy = search(model, tmp_path / "policy.json", recipe="w4a4", low_rank=4, rounding="nearest", **options)
    changed = {
        name: layer.model_copy(update={"permutation": permutation, "hadamard": 16})
        for name, layer in policy.layers.items()
        if name.endswith("ff.net.2")
    }
    policy = policy.model_copy(update={"layers": {**policy.layers, **changed}})
    checkpoint = quantize(model, policy, calibration, tmp_path / "checkpoint")
    student = _student(model, checkpoint, calibration)
    for name, layer in trainable_linears(student):
        inside = (layer.latent.detach() * layer.format.high - layer.codes()).abs() < INSIDE - 1e-4
        assert inside.float().mean() > 0.95, name
    start = error(load_quantized(checkpoint, form="qdq"), held_out)
    assert error(student, held_out) == pytest.approx(start, rel=1e-4)


@pytest.mark.parametrize("trained", ["all", "selective"])
def test_a_killed_run_goes_on_to_the_same_bytes(model, checkpoint, calibration, images, tmp_path, trained):
    settings = dataclasses.replace(TINY, schedule=(8, 4), trained=trained)
    options = {"calibration": calibration, "settings": settings, "data": images, "save_every": 2, "seed": 3}
    whole = finetune(model, checkpoint, tmp_path / "whole", **options)

    def kill(what: str, done: int, total: int | None) -> None:
        if what == "finetune" and done == (5 if trained == "all" else 3):
            raise KeyboardInterrupt

    stop = progress.listen(kill)
    try:
        with pytest.raises(KeyboardInterrupt):
            finetune(model, checkpoint, tmp_path / "killed", **options)
    finally:
        stop()
    notes = []
    stop = progress.listen(lambda what, done, total: notes.append(what) if total == 0 else None)
    killed = finetune(model, checkpoint, tmp_path / "killed", **options)
    stop()
    assert any(f"goes on from step {4 if trained == 'all' else 2}" in note for note in notes)
    assert (killed.folder / TENSORS).read_bytes() == (whole.folder / TENSORS).read_bytes()
    losses = [made.manifest.training["losses"] for made in (killed, whole)]
    assert losses[0] == losses[1]


def test_a_state_of_other_settings_is_not_gone_on_from(model, checkpoint, calibration, tmp_path):
    def kill(what: str, done: int, total: int | None) -> None:
        if what == "finetune" and done == 3:
            raise KeyboardInterrupt

    stop = progress.listen(kill)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, checkpoint, tmp_path / "out", calibration=calibration, settings=TINY, save_every=2)
    stop()
    other = dataclasses.replace(TINY, learning_rate=0.02)
    notes = []
    stop = progress.listen(lambda what, done, total: notes.append(what) if total == 0 else None)
    finetune(model, checkpoint, tmp_path / "out", calibration=calibration, settings=other)
    stop()
    assert any("starts anew" in note for note in notes)


@pytest.mark.parametrize("family", [SD3, FLUX], ids=lambda family: family.name)
def test_families_without_trajectories_learn_from_recorded_calls(family, tmp_path):
    module = packing.tiny_module(family)
    module.save_pretrained(tmp_path / "model")
    policy = packing.policy_of(family, module, bits=(4, 6), bounds=(500, 1000))
    calibration = calibrate(tmp_path / "model", tmp_path / "calibration", samples=2, steps=2)
    checkpoint = quantize(tmp_path / "model", policy, calibration, tmp_path / "checkpoint")
    settings = dataclasses.replace(TINY, steps=20, trained="all", learning_rate=0.01)
    made = finetune(tmp_path / "model", checkpoint, tmp_path / "out", calibration=calibration, settings=settings)
    losses = [line[1] for line in made.manifest.training["losses"]]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    with pytest.raises(Misuse, match="class-conditional"):
        finetune(tmp_path / "model", checkpoint, tmp_path / "b", calibration=calibration, data=tmp_path / "x")


def test_minutes_end_it_early_and_decayed(model, checkpoint, calibration, tmp_path):
    settings = dataclasses.replace(TINY, steps=100_000)
    made = finetune(model, checkpoint, tmp_path / "out", calibration=calibration, settings=settings, minutes=0.02)
    assert 1 <= made.manifest.training["steps"] < 1000


def test_a_loss_that_is_not_finite_is_told(model, checkpoint, calibration, tmp_path):
    settings = dataclasses.replace(TINY, branch_learning_rate=1e30)
    with pytest.raises(Failed, match="the loss is"):
        finetune(model, checkpoint, tmp_path / "out", calibration=calibration, settings=settings)
    assert not (tmp_path / "out").exists()


def test_strangers_are_refused(model, checkpoint, calibration, tmp_path):
    other = with_weights(model, tmp_path / "other", {"pos_embed.proj.bias": np.ones(48, np.float32)})
    with pytest.raises(Misuse, match="another model"):
        finetune(other, checkpoint, tmp_path / "out", calibration=calibration, settings=TINY)
    with pytest.raises(Misuse, match="steps"):
        finetune(model, checkpoint, tmp_path / "out", calibration=calibration, settings=Settings(steps=0))
    with pytest.raises(Misuse, match="schedule"):
        finetune(model, checkpoint, tmp_path / "out", calibration=calibration, settings=Settings(schedule=(9,)))
    with pytest.raises(Misuse, match="EMA"):
        finetune(model, checkpoint, tmp_path / "out", calibration=calibration, settings=Settings(ema=1.0))


@pytest.mark.parametrize(
    ("tensors", "cause"),
    [
        ({"images": np.zeros((2, 1, 9, 9), np.float32), "labels": np.zeros(2, np.int64)}, "images are"),
        ({"images": np.zeros((2, 1, 8, 8), np.float32), "labels": np.full(2, 10)}, "labels"),
        ({"images": np.zeros((2, 1, 8, 8), np.float32)}, "labels"),
    ],
)
def test_data_that_does_not_fit_is_refused(model, checkpoint, calibration, tmp_path, tensors, cause):
    write_tensors(tmp_path / "data.safetensors", tensors)
    with pytest.raises(Misuse, match=cause):
        finetune(
            model,
            checkpoint,
            tmp_path / "out",
            calibration=calibration,
            settings=TINY,
            data=tmp_path / "data.safetensors",
        )


def test_images_are_noised_as_diffusers_does_it(model, images):
    from diffusers import DDIMScheduler

    source = open_model(model)
    drawer = Images.load(images, source, load_transformer(model)[0].config)
    reference = DDIMScheduler.from_config(source.scheduler_config)
    inputs, velocity = drawer.draw(4, torch.Generator().manual_seed(0))
    for prediction in ("epsilon", "sample"):
        scheduler = dataclasses.replace(drawer.scheduler, prediction_type=prediction)
        again, target = dataclasses.replace(drawer, scheduler=scheduler).draw(4, torch.Generator().manual_seed(0))
        assert torch.equal(again["hidden_states"], inputs["hidden_states"])
        if prediction == "epsilon":
            noise = target
        else:
            clean = target
    noisy = reference.add_noise(clean, noise, inputs["timestep"])
    torch.testing.assert_close(noisy, inputs["hidden_states"])
    torch.testing.assert_close(reference.get_velocity(clean, noise, inputs["timestep"]), velocity)
    assert isinstance(drawer.scheduler, Scheduler) and inputs["class_labels"].max() <= 10


def test_the_command_trains(model, checkpoint, calibration, images, tmp_path, capsys):
    arguments = [
        "--steps",
        "2",
        "--batch",
        "2",
        "--schedule",
        "8,4",
        "--data",
        str(images),
        "-o",
        str(tmp_path / "out"),
    ]
    main(["finetune", str(model), str(checkpoint.folder), "--calibration", str(calibration.folder), *arguments])
    assert "2 steps" in capsys.readouterr().out
    assert Checkpoint.load(tmp_path / "out").manifest.training["settings"]["schedule"] == [8, 4]
    assert Checkpoint.load(tmp_path / "out").policy == checkpoint.policy
