"""Errors of configurations of a simulated network, on fixed items of a calibration set."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.models.blocks import blocks_of, recording, replaying
from dit2deploy.models.family import Family
from dit2deploy.nn.simulate import Simulation
from dit2deploy.stages.search.journal import Journal
from dit2deploy.stages.search.tss import OPEN, Configuration
from dit2deploy.stages.search.units import Choice, Unit

Inputs = dict[str, torch.Tensor]
FEWEST = 4  # items of a part: fewer tell nothing about a standard error
TINY, LARGEST = 1e-30, 1e30  # of a squared norm; of an error that is not finite
DIGITS = 9  # significant ones of an error: what float32 holds; the journal stays short


def items_of(
    calibration: CalibrationSet, family: Family, config: Mapping[str, Any], count: int, *, seed: int
) -> list[Inputs]:
    """`count` recorded samples as the keyword arguments of one or two calls: a quarter of them, then the rest.

    Items are spread evenly over the calls, so both parts cover all timesteps; which sample of a call, `seed` draws.
    Fewer than 4 * FEWEST items stay one part.
    """
    calls, rng = len(calibration), np.random.default_rng(seed)
    which = [(index * calls // count if count < calls else index % calls) for index in range(count)]
    batched = family.batch_axes(config)
    items = []
    opened, call = -1, {}
    for index in sorted(which):
        if index != opened:
            opened, call = index, calibration.call(index)
        row = int(rng.integers(len(call["timestep"])))
        items.append(
            {
                name: np.take(value, [row], axis=batched[name]) if name in batched else value
                for name, value in call.items()
            }
        )
    parts = [items[::4], [item for index, item in enumerate(items) if index % 4]]
    if len(parts[0]) < FEWEST:
        parts = [items]
    return [
        {
            name: torch.from_numpy(
                np.concatenate([item[name] for item in part], axis=batched[name]) if name in batched else part[0][name]
            )
            for name in part[0]
        }
        for part in parts
    ]


class Measure:
    """Relative squared errors |y - y_float|^2 / |y_float|^2 of the network's output, one an item.

    A configuration is the index of a choice for each unit; OPEN stands for the unit's entry of `environment`. Blocks
    that come before the first unit that is not OPEN are not computed again: their outputs in the environment are kept
    (float32, every block's, for each part). That holds for all networks that hand nothing but block outputs from block
    to block; the layers that are in no unit stay as `fixed` says.
    """

    def __init__(
        self,
        network: Simulation,
        fixed: Choice,
        units: Sequence[Unit],
        choices: Sequence[Sequence[Choice]],
        environment: Sequence[Choice],
        parts: Sequence[Inputs],
        journal: Journal,
    ) -> None:
        self.parts = parts
        self._network, self._units, self._choices, self._environment = network, units, choices, environment
        self._journal = journal
        self._blocks = list(blocks_of(network.module).values())
        self._recorded: dict[int, dict[int, Any]] = {}
        network.choose_float()
        self._exact = [network.call(part).double() for part in parts]
        network.choose(fixed.layers)

    def errors(self, configuration: Configuration, part: int) -> np.ndarray:
        """float64 [items of the part]."""
        chosen = [
            self._environment[unit] if choice == OPEN else self._choices[unit][choice]
            for unit, choice in enumerate(configuration)
        ]
        what = [part, [[_told(entry), entry.strength] for entry in chosen]]
        return np.array(self._journal.value(what, lambda: self._measure(configuration, chosen, part)))

    def mean(self, configuration: Configuration) -> float:
        """The mean over all items."""
        return float(np.concatenate([self.errors(configuration, part) for part in range(len(self.parts))]).mean())

    def _measure(self, configuration: Configuration, chosen: Sequence[Choice], part: int) -> list[float]:
        changed = [unit.block for unit, choice in zip(self._units, configuration, strict=True) if choice != OPEN]
        first = max(0, min(changed, default=0))
        if first and part not in self._recorded:
            self._choose(self._environment)
            with recording(self._blocks) as outputs:
                self._network.call(self.parts[part])
            # Replaying is right only where blocks run once each, in the order of registration.
            self._recorded[part] = outputs if list(outputs) == list(range(len(self._blocks))) else {}
        if not self._recorded.get(part):
            first = 0
        self._choose(chosen)
        before = [self._recorded[part][index] for index in range(first)]
        with replaying(self._blocks[:first], before):
            output = self._network.call(self.parts[part]).double()
        exact = self._exact[part]
        error = (output - exact).flatten(1).square().sum(1) / exact.flatten(1).square().sum(1).clamp_min(TINY)
        return [float(f"{value:.{DIGITS}g}") for value in torch.nan_to_num(error, nan=LARGEST).tolist()]

    def _choose(self, chosen: Sequence[Choice]) -> None:
        for entry in chosen:
            self._network.choose(entry.layers, strength=entry.strength)


def _told(choice: Choice) -> list[Any]:
    return [[name, policy.model_dump(mode="json")] for name, policy in choice.layers.items()]
