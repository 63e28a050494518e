"""AdaRound: each weight goes up or down, whichever serves the outputs, learned by descent (arXiv 2004.10568)."""

from collections.abc import Callable, Sequence

import torch

from dit2deploy.base.progress import track
from dit2deploy.formats import Format
from dit2deploy.quantizers.round_to_nearest import grouped

STRETCH = (-0.1, 1.1)  # the sigmoid reaches beyond 0 and 1 and is cut there, so that it gets there
REGULARISER = 0.01
EXPONENTS = (20.0, 2.0)  # of the regulariser, first and last
FREE = 0.2  # share of the iterations without it
LARGEST_RATE = 0.1
TRAVEL = 100.0  # learning rate times iterations


class Rounding:
    """The choice of one layer: w is about scale * clip(floor(w / scale) + h(v)), h in 0..1 a weight (equation 22)."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, fmt: Format) -> None:
        """weight float32 [N, K] in the space that is rounded in, scales float32 [N, G]. Starts at w itself."""
        wide = scales.unsqueeze(-1)
        ideal = torch.where(wide > 0, grouped(weight, scales.shape[1]) / wide, 0.0).reshape(weight.shape)
        self.format = fmt
        self.floor = ideal.floor()
        low, high = STRETCH
        rest = (ideal - self.floor - low) / (high - low)
        self.v = torch.logit(rest).requires_grad_(True)

    def h(self) -> torch.Tensor:
        low, high = STRETCH
        return (torch.sigmoid(self.v) * (high - low) + low).clamp(0, 1)

    def soft(self) -> torch.Tensor:
        """Codes float32 [N, K] that gradients pass through."""
        return (self.floor + self.h()).clamp(self.format.low, self.format.high)

    def hard(self) -> torch.Tensor:
        """Codes float32 [N, K], whole numbers: never more than 1 from those of round to nearest."""
        return (self.floor + (self.v.detach() >= 0)).clamp(self.format.low, self.format.high)

    def drawn(self, generator: torch.Generator) -> torch.Tensor:
        """Codes float32 [N, K] that go up with probability h: another error of the same kind."""
        up = torch.rand(self.v.shape, generator=generator) < self.h().detach()
        return (self.floor + up).clamp(self.format.low, self.format.high)


def regulariser(h: torch.Tensor, exponent: float) -> torch.Tensor:
    """sum of 1 - |2 h - 1|^exponent: 0 where all are 0 or 1 (equation 24)."""
    return (1 - (2 * h - 1).abs().pow(exponent)).sum()


def learn(
    roundings: Sequence[Rounding], loss: Callable[[], torch.Tensor], *, iterations: int, told: str = "adaround"
) -> None:
    """Descends on `loss()`, a new draw of the error of soft codes, plus the regulariser, whose exponent falls from 20
    to 2 after the first fifth, until every h is 0 or 1 or near it (the paper, section 4; PTQ4DiT's numbers).

    [inferred] `loss` should be 1 for round to nearest (FIMA-Q's code scales by the first value): then one strength of
    the regulariser serves layers of any scale. The paper's 20,000 iterations run at Adam's 0.001; fewer ones need a
    rate in proportion to get anywhere, up to 0.1.
    """
    rate = min(LARGEST_RATE, TRAVEL / iterations)
    optimizer = torch.optim.Adam([rounding.v for rounding in roundings], lr=rate)
    first, last = EXPONENTS
    for iteration in track(range(iterations), told):
        total = loss()
        done = iteration / iterations
        if done >= FREE:
            exponent = first + (last - first) * (done - FREE) / (1 - FREE)
            total = total + REGULARISER * sum(regulariser(rounding.h(), exponent) for rounding in roundings)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
