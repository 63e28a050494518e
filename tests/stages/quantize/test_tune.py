"""Searched options are the best of their grid, within their budget, and fully resolved."""

import itertools

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.policy import MonarchGrid
from dit2deploy.base.errors import Misuse
from dit2deploy.models.load import linears, load_transformer, open_model
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.quantize import quantize, tune
from dit2deploy.stages.quantize.hessians import sample_inputs
from dit2deploy.stages.quantize.tune import (
    budget_splits,
    least_error,
    search_group_sizes,
    search_monarch,
    search_smoothing,
)
from dit2deploy.stages.search import search


@pytest.fixture(scope="module")
def calibration(tiny_dit_folder, tmp_path_factory):
    return calibrate(tiny_dit_folder, tmp_path_factory.mktemp("calibration") / "set", samples=2, steps=2)


@pytest.fixture
def policy(tiny_dit_folder, tmp_path):
    return search(tiny_dit_folder, tmp_path / "p.json", recipe="w4a4", low_rank=0, hadamard=1, clip="absmax")


def test_smoothing_is_searched_for_every_place_and_agrees_among_q_k_and_v(
    tiny_dit_folder, policy, calibration, tmp_path
):
    found = search_smoothing(tiny_dit_folder, policy, calibration, alphas=(0.0, 0.5))
    changed = {name for name, layer in found.layers.items() if layer.smoothing}
    assert {layer.smoothing for layer in found.layers.values()} <= {0.0, 0.5}
    assert all(name.endswith(("to_q", "to_k", "to_v", "to_out.0", "net.0.proj")) for name in changed)
    quantize(tiny_dit_folder, found, calibration, tmp_path / "out")  # refuses q, k and v that differ
    none = search_smoothing(tiny_dit_folder, policy, calibration, alphas=(0.0,))
    assert none == policy


def test_group_sizes_keep_to_their_budget(tiny_dit_folder, policy, calibration):
    shapes = linears(open_model(tiny_dit_folder))

    def extra(found) -> float:
        names = [name for name, layer in policy.layers.items() if layer.weight == "int4"]
        scales = sum(
            32 * shapes[name][0] * (shapes[name][1] // (found.layers[name].group_size or shapes[name][1]) - 1)
            for name in names
        )
        return scales / sum(shapes[name][0] * shapes[name][1] for name in names)

    spent = []
    for budget in (0.0, 0.7, 9.0):
        found = search_group_sizes(tiny_dit_folder, policy, calibration, sizes=(16, 24), extra_bits=budget)
        found.check_covers(policy.model, shapes)
        spent.append(extra(found))
        assert spent[-1] <= budget
    assert spent[0] == 0 < spent[1] < spent[2]
    with pytest.raises(Misuse, match="negative"):
        search_group_sizes(tiny_dit_folder, policy, calibration, extra_bits=-1)


def test_the_multiplier_finds_what_trying_all_finds():
    """Up to the gap that a multiplier leaves: no point of its own cost is better."""
    rng = np.random.default_rng(0)
    choices = {
        str(name): [
            (size, float(error), cost) for size, error, cost in zip(range(4), errors, (0, 1, 2, 4), strict=True)
        ]
        for name, errors in enumerate(np.sort(rng.random((5, 4)))[:, ::-1])
    }
    for budget in (0, 3, 7, 20):
        found = least_error(choices, budget)
        picked = [choices[name][value] for name, value in found.items()]
        cost, error = sum(entry[2] for entry in picked), sum(entry[1] for entry in picked)
        assert cost <= budget
        for other in itertools.product(*choices.values()):
            if sum(entry[2] for entry in other) <= cost:
                assert error <= sum(entry[1] for entry in other) + 1e-12


def test_budgets_are_split_without_a_parameter_more_or_less():
    n, k = 192, 768
    splits = budget_splits(16, (n, k))
    assert splits[0] == (16, None) and len(set(splits)) == len(splits) > 8
    assert all(rank * (n + k) + (grid.parameters(n, k) if grid else 0) == 16 * (n + k) for rank, grid in splits)
    assert (0, MonarchGrid(4, 4, 4)) in splits and (8, MonarchGrid(8, 8, 1)) in splits
    assert budget_splits(16, (7, 48)) == [(16, None)]


def test_a_monarch_grid_is_chosen_where_it_errs_least(tiny_dit_folder, calibration, tmp_path, monkeypatch):
    policy = search(tiny_dit_folder, tmp_path / "p.json", recipe="w4a4", low_rank=4, rounding="gptq")
    asked = []

    def tried(x, weight, layer, moments, *, seed):
        assert moments.shape == (x.shape[1],) * 2 and layer.rounding == "nearest"
        asked.append(layer)
        return {0: 0.5, 2: 0.1 if weight.shape[0] == weight.shape[1] else 0.9}.get(layer.low_rank, 0.7)

    monkeypatch.setattr(tune, "_tried", tried)
    found = search_monarch(tiny_dit_folder, policy, calibration, blocks=(2,), shares=(0.5, 0.0))
    found.check_covers(policy.model, linears(open_model(tiny_dit_folder)))
    shapes = linears(open_model(tiny_dit_folder))
    for name, layer in policy.layers.items():
        square = shapes[name][0] == shapes[name][1]
        change = (
            {"low_rank": 2, "monarch": MonarchGrid(2, 2, 1)}
            if square
            else {"low_rank": 0, "monarch": MonarchGrid(2, 2, 2)}
        )
        assert found.layers[name] == (layer.model_copy(update=change) if layer.low_rank else layer)
    assert len(asked) == 3 * sum(layer.low_rank > 0 for layer in policy.layers.values())


def test_sampled_inputs_are_tokens_of_all_calls(tiny_dit_folder, calibration):
    network, _ = load_transformer(tiny_dit_folder)
    name = "transformer_blocks.0.ff.net.2"
    seen = []
    hook = network.get_submodule(name).register_forward_pre_hook(lambda m, arguments: seen.append(arguments[0][0]))
    found = sample_inputs(network, [name], calibration, tokens=10, seed=0)[name]
    hook.remove()
    assert found.shape == (10, 192)
    assert torch.equal(sample_inputs(network, [name], calibration, tokens=10, seed=0)[name], found)
    assert len(seen) == 2 and torch.isfinite(found).all()
