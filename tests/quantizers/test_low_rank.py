"""The low-rank branch is the truncated SVD, also in the norm of the layer's inputs."""

import math

import pytest
import torch

from dit2deploy.quantizers.low_rank import branch, moments_root, salient_residual, truncated_svd, weighted_svd


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sqnr_db(reference: torch.Tensor, found: torch.Tensor) -> float:
    return 10 * math.log10(reference.square().sum() / (reference - found).square().sum())


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (300, 40)])
def test_branch_is_the_best_of_its_rank(shape):
    weight = normal(*shape)
    up, down = truncated_svd(weight, 8, seed=0)
    assert (up.dtype, down.dtype) == (torch.float16, torch.float16)
    assert (up.shape, down.shape) == ((shape[0], 8), (8, shape[1]))
    least = torch.linalg.svdvals(weight)[8:].square().sum()
    assert (weight - branch(up, down)).square().sum() <= least * 1.002


def test_a_weight_of_low_rank_is_recovered_to_float16():
    weight = normal(100, 4) @ normal(4, 60, seed=1)
    assert sqnr_db(weight, branch(*truncated_svd(weight, 4, seed=0))) > 60


def test_the_same_seed_gives_the_same_branch():
    weight = normal(80, 50)
    first, again, other = (truncated_svd(weight, 4, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def second_moments(k: int) -> torch.Tensor:
    """Of inputs whose channels are mixed and of very different power."""
    x = normal(2000, k, seed=5) @ (normal(k, k, seed=6) * torch.linspace(1, 0.05, k).unsqueeze(1))
    return x.T @ x / len(x)


def test_weighted_branch_is_the_best_of_its_rank_on_the_layers_outputs():
    """methods.md 4.3, k = l = 1: least ||(W - AB) C^1/2|| is what SVD_r of W C^1/2 leaves."""
    weight, moments = normal(48, 64), second_moments(64)
    root = moments_root(moments)
    torch.testing.assert_close(root @ root.T, moments / moments.diagonal().mean() + 0.01 * torch.eye(64))
    found = weight - branch(*weighted_svd(weight, 6, root, seed=0))
    least = torch.linalg.svdvals(weight @ root)[6:].square().sum()
    assert (found @ root).square().sum() <= least * 1.002
    plain = weight - branch(*truncated_svd(weight, 6, seed=0))
    assert (plain @ root).square().sum() > 1.1 * least


def test_white_inputs_weigh_nothing():
    weight = normal(48, 64)
    expected = branch(*truncated_svd(weight, 6, seed=0))
    found = branch(*weighted_svd(weight, 6, moments_root(torch.eye(64)), seed=0))
    assert sqnr_db(expected, found) > 35


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        moments_root(torch.full((4, 4), float("nan")))


@pytest.mark.parametrize("orders", [1, 2])
def test_salient_channels_get_the_best_signs_and_scales(orders):
    """Each term is the least-squares multiple of the signs, channel by channel; a normal residual keeps 1 - 2 / pi of
    its energy after one (and 0.12 of it after two, as 4 levels do at best)."""
    left, power = normal(4000, 12), torch.ones(12)
    left[:, [3, 7]] *= torch.tensor([2.0, 3.0])
    power[9] = 30.0
    up, down = salient_residual(left, 3, power, orders=orders)
    assert up.dtype == down.dtype == torch.float16
    assert down.nonzero().tolist() == [[0, 3], [1, 7], [2, 9]] and down.sum() == 3
    rest = left - branch(up, down)
    assert torch.equal(rest[:, [0, 1, 2, 4, 5, 6, 8, 10, 11]], left[:, [0, 1, 2, 4, 5, 6, 8, 10, 11]])
    kept = rest[:, [3, 7, 9]].square().sum(0) / left[:, [3, 7, 9]].square().sum(0)
    assert torch.allclose(kept, torch.full((3,), 1 - 2 / math.pi if orders == 1 else 0.13), atol=0.02)
    for column in up.T:
        assert len(column.unique()) == 2**orders
        assert len(column.abs().unique()) == 2 ** (orders - 1)
