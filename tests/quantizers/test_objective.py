"""Objectives are the quadratic forms that they say they are."""

import torch

from dit2deploy.quantizers.objective import diagonal, low_rank, nystrom, squared


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forms(samples: int, n: int, rank: int) -> torch.Tensor:
    """Symmetric matrices [B, n, n] of that rank, not negative."""
    half = normal(samples, rank, n, seed=0)
    return half.transpose(1, 2) @ half


def test_a_diagonal_of_ones_is_the_squared_error_and_rows_say_whose():
    error, power = normal(3, 5, seed=0), normal(7, 5, seed=1).square()
    rows = torch.tensor([6, 0, 6])
    torch.testing.assert_close(diagonal(error, rows, power=torch.ones(7, 5)), squared(error, rows))
    expected = torch.stack([error[i] @ torch.diag(power[row]) @ error[i] for i, row in enumerate(rows)])
    torch.testing.assert_close(diagonal(error, rows, power=power), expected)


def test_the_low_rank_form_is_exact_on_the_changes_and_nowhere_above():
    fisher, changes = forms(4, 12, rank=9), normal(4, 3, 12, seed=2)
    factors = nystrom(changes, changes @ fisher)
    assert factors.shape == (4, 3, 12)
    mixed = torch.einsum("br,brn->bn", normal(4, 3, seed=3), changes)
    found = low_rank(mixed, torch.arange(4), factors=factors)
    torch.testing.assert_close(found, torch.einsum("bn,bnm,bm->b", mixed, fisher, mixed), rtol=1e-4, atol=1e-4)
    left = torch.linalg.eigvalsh(fisher - factors.transpose(1, 2) @ factors)
    assert left.min() > -1e-3 and (left > 1e-2).sum(1).eq(6).all()  # rank 9 less rank 3


def test_as_many_changes_as_its_rank_give_the_whole_matrix():
    fisher, changes = forms(2, 8, rank=3), normal(2, 3, 8, seed=1)
    factors = nystrom(changes, changes @ fisher)
    torch.testing.assert_close(factors.transpose(1, 2) @ factors, fisher, rtol=1e-3, atol=1e-3)


def test_changes_that_repeat_or_do_nothing_add_nothing():
    fisher, once = forms(1, 6, rank=4), normal(1, 1, 6, seed=1)
    again = torch.cat([once, once, torch.zeros(1, 1, 6)], 1)
    factors = nystrom(again, again @ fisher)
    single = nystrom(once, once @ fisher)
    torch.testing.assert_close(factors.transpose(1, 2) @ factors, single.transpose(1, 2) @ single)
    assert not nystrom(torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)).any()
