"""Two models small enough for brute force, in numpy: residual blocks for TSS, a sampler for the beam of AdaTSQ."""

from functools import cached_property
from itertools import product

import numpy as np

from dit2deploy.ops.hadamard_quantize import GAUSSIAN_STEPS

ROWS, WIDTH, HIDDEN = 48, 32, 64


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """Each row rounded to the codes that suit a normal distribution."""
    step = GAUSSIAN_STEPS[bits - 2] * np.sqrt((x**2).mean(-1, keepdims=True))
    most = 2 ** (bits - 1) - 1
    return np.clip(np.round(x / step), -most, most) * step


class Blocks:
    """methods.md 4.1: 8 residual blocks LN-MLP, weights and activations of a block at 2, 3 or 4 bits (smaller here)."""

    bits = (2, 3, 4)

    def __init__(self, seed: int, count: int = 8) -> None:
        rng = np.random.default_rng(seed)
        gains = rng.uniform(0.3, 1.5, count)
        self.weights = [
            (
                rng.normal(size=(WIDTH, HIDDEN)) / np.sqrt(WIDTH),
                gain * rng.normal(size=(HIDDEN, WIDTH)) / np.sqrt(HIDDEN),
            )
            for gain in gains
        ]
        self.x = rng.normal(size=(ROWS, WIDTH))
        self.forms = [
            {bits: tuple(rounded(w.T, bits).T for w in pair) for bits in self.bits} | {None: pair}
            for pair in self.weights
        ]
        self.exact = self.run([None] * count)
        self.asked = 0

    def block(self, index: int, bits: int | None, x: np.ndarray) -> np.ndarray:
        up, down = self.forms[index][bits]
        cut = (lambda value: value) if bits is None else (lambda value: rounded(value, bits))
        normal = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        return x + cut(np.maximum(cut(normal) @ up, 0)) @ down

    def run(self, bits: list[int | None]) -> np.ndarray:
        x = self.x
        for index, width in enumerate(bits):
            x = self.block(index, width, x)
        return x

    def errors(self, y: np.ndarray) -> np.ndarray:
        return ((y - self.exact) ** 2).sum(-1) / (self.exact**2).sum(-1)

    def measure(self, configuration: tuple[int, ...]) -> np.ndarray:
        """Choice -1: full precision."""
        self.asked += 1
        return self.errors(self.run([None if choice < 0 else self.bits[choice] for choice in configuration]))

    def best_at(self, budgets: tuple[float, ...]) -> list[float]:
        """The least mean error over all configurations at each average of bits."""
        layers, best = [(0, self.x)], [np.inf] * len(budgets)
        for index in range(len(self.weights)):
            layers = [(cost + bits, self.block(index, bits, x)) for cost, x in layers for bits in self.bits]
        for cost, y in layers:
            error = self.errors(y).mean()
            for at, budget in enumerate(budgets):
                if cost <= budget * len(self.weights) + 1e-9:
                    best[at] = min(best[at], error)
        return best


class Sampler:
    """methods.md 5.2: a 3-layer nonlinear sampler of 6 steps and 3 candidates of 3, 3.67 and 4.67 bits."""

    candidates = ((3, 3, 3), (4, 4, 3), (5, 5, 4))
    steps = 6

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.weights = [rng.normal(size=(32, 32)) * 1.4 / np.sqrt(32) for _ in range(3)]
        self.shift = rng.normal(size=(self.steps, 32))
        self.start = rng.normal(size=(8, 32))
        self.scale = rng.uniform(0.15, 0.6, self.steps)
        self.exact = [self.start]
        for step in range(self.steps):
            self.exact.append(self.advance(self.exact[-1], step, None))
        self.costs = [[float(np.mean(bits)) / self.steps for bits in self.candidates]] * self.steps

    def advance(self, x: np.ndarray, step: int, bits: tuple[int, ...] | None) -> np.ndarray:
        y = x + self.shift[step]
        for index, weight in enumerate(self.weights):
            y = np.tanh((y if bits is None else rounded(y, bits[index])) @ weight)
        return (1 - 0.3 * self.scale[step]) * x + self.scale[step] * y

    def error(self, x: np.ndarray, step: int) -> float:
        exact = self.exact[step + 1]
        return float(((x - exact) ** 2).sum() / (exact**2).sum())

    @cached_property
    def all_paths(self) -> list[tuple[float, float]]:
        """Average bits and final error of all paths."""
        states = [(0.0, self.start)]
        for step in range(self.steps):
            states = [
                (cost + self.costs[step][choice], self.advance(x, step, bits))
                for cost, x in states
                for choice, bits in enumerate(self.candidates)
            ]
        assert len(states) == len(list(product(self.candidates, repeat=self.steps)))
        return [(cost, self.error(x, self.steps - 1)) for cost, x in states]
