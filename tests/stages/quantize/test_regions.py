"""The search of regions: least weighted output error of each timestep group, with a gradient that is one."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.policy import Policy
from dit2deploy.artefacts.timesteps import whole
from dit2deploy.base import progress
from dit2deploy.formats import by_name, unpack
from dit2deploy.models.load import load_transformer
from dit2deploy.nn.convert import load_quantized
from dit2deploy.quantizers.multi_region import dequantized, gelu_candidates, softmax_candidates
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.quantize import quantize, regions
from dit2deploy.stages.quantize.regions import search_regions
from dit2deploy.stages.search import search

ATTENTION = "transformer_blocks.0.attn1"
LAYER = "transformer_blocks.1.ff.net.2"


@pytest.fixture(scope="module")
def calibration(tiny_dit_folder, tmp_path_factory):
    return calibrate(tiny_dit_folder, tmp_path_factory.mktemp("calibration") / "set", samples=2, steps=4)


@pytest.fixture(scope="module")
def policy(tiny_dit_folder, tmp_path_factory) -> Policy:
    out = tmp_path_factory.mktemp("policy") / "policy.json"
    return search(tiny_dit_folder, out, recipe="tq-dit-w6a6", groups=2)


@pytest.fixture
def network(tiny_dit_folder):
    return load_transformer(tiny_dit_folder)[0]


def call_of(calibration, index: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in calibration.call(index).items()}


def test_the_step_of_gelu_is_that_of_least_error(network, policy, calibration, monkeypatch):
    """By another way: the layer's output is moved by the error of each candidate, and d(v . f) by its gradient."""
    monkeypatch.setattr(regions, "ROWS", 1 << 20)
    found = search_regions(network, policy, calibration, seed=0)[f"{LAYER}.regions"]
    layer = network.get_submodule(LAYER)
    seen: dict[str, torch.Tensor] = {}

    def shift(module, arguments, output):
        seen["x"] = arguments[0].detach()
        seen["delta"] = torch.zeros_like(output).requires_grad_(True)
        return output + seen["delta"]

    handle = layer.register_forward_hook(shift)
    largest = [0.0, 0.0]
    calls = []
    for index, timestep in enumerate(calibration.manifest.timesteps):
        group = int(timestep >= 500)
        output = network(**call_of(calibration, index), return_dict=False)[0]
        v = torch.randn(output.shape, generator=torch.Generator().manual_seed(index))
        (gradient,) = torch.autograd.grad((output * v).sum(), seen["delta"])
        calls.append((group, seen["x"], gradient))
        largest[group] = max(largest[group], float(seen["x"].max()))
    handle.remove()
    for group in (0, 1):
        candidates = gelu_candidates(largest[group], 6)
        errors = [
            sum(
                float((g * torch.nn.functional.linear(dequantized(x, candidate, 6) - x, layer.weight)).square().sum())
                for own, x, g in calls
                if own == group
            )
            for candidate in candidates
        ]
        np.testing.assert_allclose(found[group], candidates[int(np.argmin(errors))].numpy(), rtol=1e-6)


def test_splits_are_candidates_of_their_width(network, policy, calibration):
    table = search_regions(network, policy, calibration, seed=0)[f"{ATTENTION}.processor.regions"]
    assert table.shape == (2, 3) and table.dtype == np.float32
    candidates = softmax_candidates(6).tolist()
    assert all(row in candidates for row in table.tolist())


def test_flow_matchings_first_timestep_is_in_the_last_group(network, policy, calibration):
    """Of 1000 training steps, FLUX and SD3 start at t = 1000; 499.6 of a pipeline is in the group below 500."""
    timesteps = (1000, whole(749.6), whole(500.0), whole(499.6))
    moved = replace(calibration, manifest=calibration.manifest.model_copy(update={"timesteps": timesteps}))
    found = search_regions(network, policy, moved, seed=0)[f"{LAYER}.regions"]
    alike = calibration.manifest.model_copy(update={"timesteps": (999, 700, 600, 400)})
    expected = search_regions(network, policy, replace(calibration, manifest=alike), seed=0)[f"{LAYER}.regions"]
    np.testing.assert_array_equal(found, expected)


def test_processors_come_back(network, policy, calibration):
    before = network.get_submodule(ATTENTION).processor
    search_regions(network, policy, calibration, seed=0)
    assert network.get_submodule(ATTENTION).processor is before


def test_the_gradient_does_not_vanish_where_that_of_the_divergence_does(network, calibration):
    """Methods.md 7.2: at least 1e-4 of the gradient of the squared distance to a target."""
    latents = call_of(calibration, 1)["hidden_states"].requires_grad_(True)
    output = network(**{**call_of(calibration, 1), "hidden_states": latents}, return_dict=False)[0]
    generator = torch.Generator().manual_seed(0)
    v, target = (torch.randn(output.shape, generator=generator) for _ in range(2))

    def size(loss: torch.Tensor) -> float:
        return float(torch.autograd.grad(loss, latents, retain_graph=True)[0].norm())

    known = output.detach().softmax(-1)
    divergence = torch.nn.functional.kl_div(output.log_softmax(-1), known, reduction="batchmean")
    reference = size((output - target).square().mean() * output.numel())
    assert size((output * v).sum()) > 0.1 * reference
    assert size(divergence) < 1e-4 * reference


def test_a_group_without_calls_takes_its_neighbours_steps(network, tiny_dit_folder, calibration, tmp_path):
    policy = search(tiny_dit_folder, tmp_path / "policy.json", recipe="tq-dit", groups=8)
    notes: list[str] = []
    stop = progress.listen(lambda what, done, total: notes.append(what) if total == 0 else None)
    try:
        table = search_regions(network, policy, calibration, seed=0)[f"{LAYER}.regions"]
    finally:
        stop()
    groups = np.searchsorted(policy.timestep_bounds, calibration.manifest.timesteps, side="right")
    assert len(set(groups)) == 4
    assert "regions: 4 timestep groups have no call in the calibration set; neighbours serve" in notes
    assert len(np.unique(table, axis=0)) == 4


def test_where_no_gradient_comes_errors_count_unweighted(network, policy, calibration):
    """As in a network whose gates are zero (adaLN-zero before training)."""
    for name, parameter in network.named_parameters():
        if name.startswith("proj_out_2"):
            parameter.zero_()
    notes: list[str] = []
    stop = progress.listen(lambda what, done, total: notes.append(what) if total == 0 else None)
    try:
        table = search_regions(network, policy, calibration, seed=0)[f"{ATTENTION}.processor.regions"]
    finally:
        stop()
    assert "regions: no gradient reaches 4 places; their errors count unweighted" in notes
    assert (table[:, 0] < 1).all()


def test_the_checkpoint_holds_the_tables_and_a_killed_run_keeps_them(
    tiny_dit_folder, policy, calibration, tmp_path, monkeypatch
):
    made = quantize(tiny_dit_folder, policy, calibration, tmp_path / "whole")
    assert made.tensors.read(f"{ATTENTION}.processor.qmax").tolist() == [31, 31]
    assert np.abs(made.tensors.read(f"{LAYER}.regions")).min(0)[1:].all()
    load_quantized(made)

    monkeypatch.setattr("dit2deploy.artefacts.checkpoint.write_distinct_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(tiny_dit_folder, policy, calibration, tmp_path / "killed")
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules["dit2deploy.stages.quantize.quantize"], "search_regions", lambda *_, **__: 1 / 0)
    again = quantize(tiny_dit_folder, policy, calibration, tmp_path / "killed")
    assert again.sha256 == made.sha256


def test_limited_codes_stay_within_their_bits(tiny_dit_folder, policy, calibration, tmp_path):
    made = quantize(tiny_dit_folder, policy, calibration, tmp_path / "made")
    k = 4 * 48
    codes = unpack(made.tensors.read(f"{LAYER}.weight"), by_name("int8"), k)
    assert 25 < abs(codes).max() <= 31
