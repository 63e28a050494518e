"""Bits go to the steps whose errors reach the image; a step's reach is that of a disturbance of its output."""

import numpy as np
import pytest

from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.models.load import load_transformer
from dit2deploy.nn.simulate import Simulation
from dit2deploy.sampling import Scheduler
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.search import search, time_knapsack
from dit2deploy.stages.search.walk import Walk

STEPS = 4


@pytest.fixture(scope="module")
def calibration(tiny_dit_folder, tmp_path_factory):
    return calibrate(tiny_dit_folder, tmp_path_factory.mktemp("calibration") / "set", samples=3, steps=STEPS)


@pytest.mark.parametrize("reached", (0, STEPS - 1))
def test_bits_go_where_errors_reach_the_image(reached, tiny_dit_folder, calibration, tmp_path, monkeypatch):
    """With an error that counts at one sampler step alone, that one gets them, and no other has a use for them."""
    monkeypatch.setattr(time_knapsack, "reaches", lambda *_, **__: [float(step == reached) for step in range(STEPS)])
    policy = search(
        tiny_dit_folder,
        tmp_path / "policy.json",
        recipe="time-knapsack",
        calibration=calibration,
        **{"bits": (2, 4, 8), "budget": 3.5, "groups": STEPS, "items": 16, "trajectories": 1, "grid": "mid-tread"},
    )
    layers = [layer for layer in policy.layers.values() if layer.is_quantized and layer.low_rank]
    bits = np.array([layer.activation_bits[::-1] for layer in layers])  # by sampler step: the noisiest first
    others = np.delete(bits, reached, axis=1)
    assert (others == 2).all()
    assert bits[:, reached].mean() > 3


def test_the_reach_of_the_last_step_is_what_the_sampler_makes_of_it(tiny_dit_folder, calibration):
    """One step of the sampler is affine in the model's output; its factor is had from any two outputs."""
    module, family = load_transformer(tiny_dit_folder)
    network = Simulation(module, bounds=(1000,), timestep_scale=family.timestep_scale)
    policy = LayerPolicy(weight="int4", activation_bits=(4,))
    quantized = {name: policy for name in network.layers if name.startswith("transformer_blocks.0.ff")}
    walk = Walk(network, calibration, samples=[1])
    found = time_knapsack.reaches(network, walk, quantized)
    assert len(found) == STEPS and min(found) > 0

    network.choose_float()
    outputs: list[np.ndarray] = []

    def see(step: int, output: np.ndarray) -> np.ndarray:
        outputs.append(output.astype(np.float64))
        return output

    before = walk.steps(walk.start, range(STEPS - 1))
    final = walk.steps(before, [STEPS - 1], see)
    network.choose(quantized)
    walk.steps(before, [STEPS - 1], see)

    scheduler, last = Scheduler.from_config(calibration.manifest.scheduler), calibration.manifest.timesteps[-1]
    one, none = np.ones_like(final), np.zeros_like(final)
    factor = (scheduler.step(one, last, none, steps=STEPS) - scheduler.step(none, last, none, steps=STEPS)).mean()
    guidance = calibration.manifest.guidance
    exact, changed = (guidance * output[:1] + (1 - guidance) * output[1:] for output in outputs)
    expected = factor**2 * np.square(changed - exact).sum() / np.square(final).sum()
    whole, moved = outputs
    apart = np.exp(np.log(np.square(moved - whole).sum((1, 2, 3)) / np.square(whole).sum((1, 2, 3))).mean())
    assert found[-1] == pytest.approx(expected / apart, rel=1e-3)
