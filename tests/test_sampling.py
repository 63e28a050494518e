"""The numpy sampler takes the very steps of diffusers' DDIMScheduler, and guides as its DiTPipeline does."""

import itertools
import json

import numpy as np
import pytest

from dit2deploy.base.errors import Misuse
from dit2deploy.sampling import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    SPACINGS,
    Scheduler,
    initial_noise,
    trajectory,
)

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

COMBINATIONS = itertools.product(
    BETA_SCHEDULES, PREDICTION_TYPES, SPACINGS, (False, True), (False, True), (False, True)
)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("count", [1000, 999, 50])
def test_alphas_equal_those_of_diffusers(beta_schedule, rescale, count):
    theirs = diffusers.DDIMScheduler(count, beta_schedule=beta_schedule, rescale_betas_zero_snr=rescale)
    ours = Scheduler.from_config(theirs.config)
    # torch's vectorised square root is off by a last bit now and then, so only the plain schedules agree in all bits.
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if rescale else {"rtol": 5e-7}
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), **tolerance)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_equal_those_of_diffusers(spacing, offset):
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    ours = Scheduler.from_config(theirs.config)
    for steps in range(1, 400):
        theirs.set_timesteps(steps)
        np.testing.assert_array_equal(ours.timesteps(steps), theirs.timesteps.numpy(), err_msg=str(steps))


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_step_equals_that_of_diffusers(combination, steps):
    beta_schedule, prediction_type, spacing, clip, to_one, rescale = combination
    theirs = diffusers.DDIMScheduler(
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        clip_sample=clip,
        set_alpha_to_one=to_one,
        rescale_betas_zero_snr=rescale,
    )
    theirs.set_timesteps(steps)
    ours = Scheduler.from_config(theirs.config)
    random = np.random.default_rng(0)
    # A last bit of alpha near 1 is a large part of 1 - alpha, which "sample" divides by.
    tolerance = 2e-3 if rescale else 3e-6
    for timestep in theirs.timesteps.tolist():
        sample, output = random.standard_normal((2, 2, 3, 4, 4), dtype=np.float32)
        want = theirs.step(torch.from_numpy(output), timestep, torch.from_numpy(sample)).prev_sample.numpy()
        got = ours.step(output, timestep, sample, steps=steps)
        assert got.dtype == np.float32
        finite = np.abs(want[np.isfinite(want)])  # without any signal left, "epsilon" divides by zero; so do they
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.max(finite, initial=0))


def test_trained_betas_are_taken_as_they_are():
    betas = [0.1, 0.2, 0.4]
    theirs = diffusers.DDIMScheduler(3, trained_betas=betas)
    ours = Scheduler.from_config(theirs.config)
    np.testing.assert_array_equal(ours.alphas_cumprod, theirs.alphas_cumprod.numpy())


def test_load_takes_file_scheduler_folder_and_pipeline_folder(tmp_path):
    theirs = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    theirs.save_pretrained(tmp_path / "scheduler")
    loaded = [
        Scheduler.load(path)
        for path in (
            tmp_path,
            tmp_path / "scheduler",
            tmp_path / "scheduler" / "scheduler_config.json",
        )
    ]
    assert loaded[0] == loaded[1] == loaded[2]
    assert loaded[0].timestep_spacing == "trailing"


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"thresholding": True}, "thresholding"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "flow"}, "flow"),
        ({"timestep_spacing": "karras"}, "karras"),
    ],
)
def test_what_is_not_supported_is_named(config, word, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(Misuse, match=word) as error:
        Scheduler.load(tmp_path)
    assert error.value.cure


def test_steps_beyond_the_training_range_are_refused():
    for scheduler, steps in (
        (Scheduler(), 0),
        (Scheduler(), 1001),
        (Scheduler(steps_offset=1), 1000),
    ):
        with pytest.raises(Misuse, match="step"):
            scheduler.timesteps(steps)


class CountingModel:
    """A stand-in for a class-conditional model: linear in latents and label, and it remembers its batches."""

    def __init__(self, channels_out: int):
        self.channels_out = channels_out
        self.batches: list[int] = []

    def __call__(self, latents, timesteps, labels):
        assert latents.dtype == np.float32 and timesteps.dtype == np.int64 and labels.dtype == np.int64
        assert len(latents) == len(timesteps) == len(labels)
        self.batches.append(len(latents))
        value = 0.5 * latents + 0.01 * labels[:, None, None, None] + 1e-4 * timesteps[:, None, None, None]
        copies = self.channels_out // latents.shape[1]
        return np.concatenate([value * (copy + 1) for copy in range(copies)], axis=1).astype(np.float32)


def pipeline_latents(model, scheduler, labels, steps, guidance, noise, null_label):
    """The loop of diffusers' DiTPipeline.__call__ (0.42) around a numpy model."""
    channels = noise.shape[1]
    latents = torch.from_numpy(np.concatenate([noise, noise]) if guidance > 1 else noise)
    asked = np.concatenate([labels, np.full_like(labels, null_label)]) if guidance > 1 else labels
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        if guidance > 1:
            half = latents[: len(latents) // 2]
            latents = torch.cat([half, half])
        output = torch.from_numpy(model(latents.numpy(), np.full(len(latents), int(t)), asked))
        if guidance > 1:
            conditional, unconditional = output[:, :channels].chunk(2)
            half = unconditional + guidance * (conditional - unconditional)
            output = torch.cat([torch.cat([half, half]), output[:, channels:]], dim=1)
        latents = scheduler.step(output[:, :channels], t, latents).prev_sample
    return (latents.chunk(2)[0] if guidance > 1 else latents).numpy()


@pytest.mark.parametrize("channels_out", [2, 4], ids=["plain", "learned sigma"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5, 4.0])
def test_trajectory_ends_where_the_pipeline_of_diffusers_ends(channels_out, guidance):
    theirs = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    labels, noise = np.array([3, 0, 9]), initial_noise([1, 2, 3], (2, 4, 4))
    model = CountingModel(channels_out)
    taken = list(
        trajectory(
            model,
            scheduler=Scheduler.from_config(theirs.config),
            labels=labels,
            steps=10,
            guidance=guidance,
            noise=noise,
            null_label=10,
        )
    )
    assert model.batches == [3 if guidance <= 1 else 6] * 10
    want = pipeline_latents(CountingModel(channels_out), theirs, labels, 10, guidance, noise, 10)
    np.testing.assert_allclose(taken[-1].after, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(taken[0].before, noise)
    for earlier, later in itertools.pairwise(taken):
        assert later.before is earlier.after and later.index == earlier.index + 1
        assert later.timestep < earlier.timestep
        assert earlier.output.shape == noise.shape


def test_trajectory_refuses_what_it_cannot_guess():
    model, noise = CountingModel(2), initial_noise([0, 1], (2, 4, 4))
    common = {"scheduler": Scheduler(), "steps": 2, "noise": noise}
    with pytest.raises(Misuse, match="null_label"):
        list(trajectory(model, labels=np.array([0, 1]), guidance=2.0, **common))
    with pytest.raises(Misuse, match="labels"):
        list(trajectory(model, labels=np.array([0]), guidance=1.0, **common))
    with pytest.raises(Misuse, match="turned latents"):
        list(trajectory(CountingModel(6), labels=np.array([0, 1]), guidance=1.0, **common))


def test_noise_of_a_seed_does_not_depend_on_its_batch():
    whole = initial_noise([5, 6, 7], (1, 4, 4))
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole[1:2], initial_noise([6], (1, 4, 4)))
    assert not np.array_equal(whole[0], whole[1])
    assert initial_noise([], (1, 4, 4)).shape == (0, 1, 4, 4)
