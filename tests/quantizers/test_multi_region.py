"""MRQ against the table of methods.md 7.3, and the properties that tell the exclusive form from the public code's."""

import pytest
import torch

from dit2deploy.evaluate.fidelity import sqnr_db
from dit2deploy.ops.multi_region_quantize import multi_region_quantize
from dit2deploy.quantizers.multi_region import (
    SPLITS,
    dequantized,
    gelu_candidates,
    output_errors,
    softmax_candidates,
)


@pytest.fixture(scope="module")
def probabilities() -> torch.Tensor:
    """Rows of softmax over 256 tokens of N(0, 2^2) logits, [4096, 256]."""
    return (2 * torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))).softmax(-1)


@pytest.fixture(scope="module")
def gelu() -> torch.Tensor:
    return torch.nn.functional.gelu(1.5 * torch.randn(256, 1152, generator=torch.Generator().manual_seed(1)))


def plain(x: torch.Tensor, candidates: torch.Tensor, bits: int) -> torch.Tensor:
    """The candidate of least squared error."""
    errors = [(dequantized(x, candidate, bits) - x).square().sum() for candidate in candidates]
    return candidates[int(torch.stack(errors).argmin())]


def sqnr(x: torch.Tensor, regions: torch.Tensor, bits: int) -> float:
    return sqnr_db(x.numpy(), dequantized(x, regions, bits).numpy())


@pytest.mark.parametrize(
    ("bits", "uniform_db", "best_db", "split"), [(4, 9.23, 14.88, 3), (6, 16.86, 24.69, 4), (8, 25.96, 36.36, 4)]
)
def test_softmax_reaches_the_table(probabilities, bits: int, uniform_db: float, best_db: float, split: int):
    step = 1 / (2**bits - 1)
    uniform = (probabilities / step).round() * step
    assert sqnr_db(probabilities.numpy(), uniform.numpy()) == pytest.approx(uniform_db, abs=0.5)
    best = plain(probabilities, softmax_candidates(bits), bits)
    assert sqnr(probabilities, best, bits) == pytest.approx(best_db, abs=0.5)
    assert float(best[0]) == 2.0**-split


@pytest.mark.parametrize(("bits", "clipped_db"), [(4, 18.6), (6, 29.3), (8, 40.1)])
def test_gelu_reaches_the_table(gelu, bits: int, clipped_db: float):
    best = plain(gelu, gelu_candidates(float(gelu.max()), bits), bits)
    # The step of negative values is K / (K - 1) of the table's, which costs most at 4 bits.
    assert sqnr(gelu, best, bits) == pytest.approx(clipped_db, abs=0.5)


@pytest.mark.parametrize("bits", (6, 8))
def test_the_error_has_no_offset(probabilities, gelu, bits: int):
    """The public code adds a clamped low and a clamped high part: about x + split for every x."""
    best = plain(probabilities, softmax_candidates(bits), bits)
    offset = float((dequantized(probabilities, best, bits) - probabilities).mean())
    assert abs(offset) < 0.005 * float(best[0])  # what is left: most probabilities round to 0
    best = plain(gelu, gelu_candidates(float(gelu.max()), bits), bits)
    assert abs(float((dequantized(gelu, best, bits) - gelu).mean())) < 0.01 * float(gelu.abs().mean())


def test_it_is_what_the_op_computes(probabilities, gelu):
    for x, regions in ((probabilities, softmax_candidates(6)[4]), (gelu, gelu_candidates(4.0, 6)[90])):
        q_low, q_high, s_low, s_high = multi_region_quantize(x, torch.tensor([31.0]), regions.unsqueeze(0))
        torch.testing.assert_close(dequantized(x, regions, 6), q_low * s_low + q_high * s_high)


def test_steps_are_powers_of_two_apart():
    for bits in range(2, 9):
        for i, (_, low, high) in enumerate(softmax_candidates(bits).tolist()):
            assert high / low == 2.0**i
    assert len(SPLITS) == 20


def test_importance_decides():
    """Where only the row of large probabilities counts, the split is that of this row."""
    generator = torch.Generator().manual_seed(2)
    flat = torch.rand(1, 256, generator=generator) / 256
    peaked = 0.5 + 0.5 * torch.rand(1, 256, generator=generator)
    x, other = torch.cat([flat, peaked]), torch.eye(256)
    candidates = softmax_candidates(6)

    def best(first: float, second: float) -> float:
        importance = torch.tensor([[first], [second]]).expand(2, 256)
        return float(candidates[int(output_errors(x, other, importance, candidates, 6).argmin()), 0])

    assert best(1, 0) <= 2.0**-7
    assert best(0, 1) >= 0.5


def test_a_product_with_ones_is_the_offset():
    """HO looks at outputs: errors that cancel in them do not count, an offset does."""
    x = torch.full((1, 64), 0.3)
    candidates = torch.tensor([[0.0, 1.0, 0.125], [0.0, 1.0, 0.1]])
    errors = output_errors(x, torch.ones(64, 1), torch.ones(1, 1), candidates, 4)
    want = [(64 * (0.25 - 0.3)) ** 2, 0.0]
    assert errors.tolist() == pytest.approx(want, rel=1e-5)
