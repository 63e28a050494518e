"""The Monarch branch is the truncated SVD of each block, with the counts, ranks and energies of methods.md 4.3."""

import pytest
import torch

from dit2deploy.artefacts.policy import MonarchGrid
from dit2deploy.quantizers import monarch
from dit2deploy.quantizers.low_rank import moments_root
from dit2deploy.quantizers.monarch import dense, factors, project


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blockwise_svd(weight: torch.Tensor, grid: MonarchGrid) -> torch.Tensor:
    """By the index convention alone: outputs o = row * blocks_out + block, inputs in contiguous runs."""
    a, b, rank = grid
    out, p = torch.zeros_like(weight), weight.shape[1] // a
    for i in range(a):
        for j in range(b):
            u, s, v = torch.linalg.svd(weight[j::b, i * p : (i + 1) * p], full_matrices=False)
            out[j::b, i * p : (i + 1) * p] = (u[:, :rank] * s[:rank]) @ v[:rank]
    return out


@pytest.mark.parametrize(
    ("n", "k", "grid", "parameters", "largest_rank"),
    [
        (12, 8, MonarchGrid(2, 3, 1), 48, 6),
        (12, 8, MonarchGrid(2, 3, 2), 96, 8),
        (1152, 1152, MonarchGrid(4, 4, 8), 73728, 128),
        (1152, 1152, MonarchGrid(1, 1, 32), 73728, 32),
        (64, 64, MonarchGrid(8, 8, 1), 1024, 64),
    ],
)
def test_it_is_the_blockwise_truncated_svd(n, k, grid, parameters, largest_rank):
    weight = normal(n, k)
    down, up = factors(weight, grid)
    assert down.shape == (k, grid.rank, grid.blocks_out) and up.shape == (grid.blocks_in, grid.rank, n)
    assert down.numel() + up.numel() == grid.parameters(n, k) == parameters
    made = dense(down, up)
    torch.testing.assert_close(made, blockwise_svd(weight, grid), rtol=0, atol=1e-10)
    assert torch.linalg.matrix_rank(made) == largest_rank


def test_one_block_is_the_svd():
    weight = normal(40, 60)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    expected = (u[:, :5] * s[:5]) @ v[:5]
    found = dense(*factors(weight, MonarchGrid(1, 1, 5)))
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(("blocks", "rank", "white", "decaying"), [(1, 32, 0.1006, 0.840), (8, 4, 0.1012, 0.613)])
def test_it_takes_the_energy_of_the_table(blocks, rank, white, decaying):
    """methods.md 4.3 at 1152 and equal parameters: many small blocks gain a little on noise and lose on a spectrum."""
    size = 1152
    grid = MonarchGrid(blocks, blocks, rank)
    u, v = (torch.linalg.qr(normal(size, size, seed=seed)).Q for seed in (1, 2))
    for weight, expected, margin in (
        (normal(size, size), white, 0.0008),
        ((u * torch.arange(1, size + 1) ** -0.7) @ v.T, decaying, 0.006),
    ):
        energy = 1 - (weight - dense(*factors(weight, grid))).square().sum() / weight.square().sum()
        assert energy == pytest.approx(expected, abs=margin)


def test_weighted_factors_are_best_where_blocks_of_inputs_are_uncorrelated():
    """Least |(E - M) C^1/2| of each block is what the truncated SVD of E C^1/2 leaves."""
    weight, grid, p = normal(24, 32), MonarchGrid(2, 3, 2), 16
    mixed = [normal(p, p, seed=seed) * torch.linspace(1, 0.05, p).unsqueeze(1) for seed in (3, 4)]
    root = moments_root(torch.block_diag(*(part @ part.T for part in mixed)).float()).double()
    least = sum(
        torch.linalg.svdvals(weight[j::3, i * p : (i + 1) * p] @ root[i * p : (i + 1) * p, i * p : (i + 1) * p])[2:]
        .square()
        .sum()
        for i in range(2)
        for j in range(3)
    )
    left = ((weight - dense(*factors(weight, grid, root=root))) @ root).square().sum()
    torch.testing.assert_close(left, least)
    assert ((weight - dense(*factors(weight, grid))) @ root).square().sum() > 1.1 * least


def test_white_inputs_weigh_nothing():
    weight, grid = normal(24, 32), MonarchGrid(4, 2, 2)
    plain, weighted = (dense(*factors(weight, grid, root=root)) for root in (None, moments_root(torch.eye(32))))
    torch.testing.assert_close(weighted, plain)


def test_a_checkpoint_holds_float16_that_no_size_of_weights_overflows():
    weight, grid = normal(48, 96) * 1e4, MonarchGrid(4, 4, 8)
    down, up = project(weight, grid)
    assert down.dtype == up.dtype == torch.float16
    exact = dense(*factors(weight, grid))
    assert (dense(down, up) - exact).norm() < 2e-3 * exact.norm()
    empty = dense(*project(torch.zeros(48, 96), grid))
    assert empty.dtype == torch.float32 and not empty.any()


@pytest.mark.parametrize(
    ("grid", "message"),
    [((5, 1, 1), "does not divide"), ((1, 7, 1), "divide"), ((4, 4, 9), "rank 9"), ((0, 1, 1), "1")],
)
def test_a_grid_that_does_not_fit_is_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        factors(normal(32, 48), MonarchGrid(*grid))


def test_sweeps_find_more_where_blocks_of_inputs_are_correlated():
    """Each sweep lowers |(E - M) C^1/2|; without them methods.md 4.3's formula may do worse than no branch at all."""
    x = normal(2000, 32, seed=5) @ normal(32, 8, seed=6) @ normal(8, 32, seed=7)
    root = moments_root((x.T @ x).float()).double()
    error, cancelling = normal(24, 32), root.inverse().mT  # E L is white: no input block can be changed alone
    error = error @ cancelling.mT
    errors = []
    for sweeps in range(4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(monarch, "SWEEPS", sweeps)
            made = dense(*factors(error, MonarchGrid(4, 4, 2), root=root))
        errors.append(float(((error - made) @ root).square().sum()))
    assert errors[0] > (error @ root).square().sum() > errors[1] > errors[2] > errors[3]
