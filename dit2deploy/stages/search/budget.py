"""What a search may spend and what layers cost: average bits, bytes of the checkpoint, or milliseconds on a device."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dit2deploy.artefacts.device_table import DeviceTable, as_run
from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import note
from dit2deploy.evaluate.size import stored_bytes

Unit = Literal["bits", "bytes", "milliseconds"]

_FACTORS: dict[str, tuple[Unit, float]] = {
    "": ("bits", 1),
    "bit": ("bits", 1),
    "bits": ("bits", 1),
    "b": ("bytes", 1),
    "kb": ("bytes", 1e3),
    "mb": ("bytes", 1e6),
    "gb": ("bytes", 1e9),
    "ms": ("milliseconds", 1),
}


@dataclass(frozen=True)
class Budget:
    amount: float
    unit: Unit

    def __str__(self) -> str:
        return shown(self.amount, self.unit)

    @property
    def told(self) -> float | str:
        """As a policy and a front hold it: a plain number for bits."""
        return self.amount if self.unit == "bits" else str(self)


def shown(amount: float, unit: Unit) -> str:
    if unit == "bytes":
        return f"{amount / 1e6:.7g} MB"
    return f"{amount:.7g} {'ms' if unit == 'milliseconds' else 'bits'}"


def parse(text: float | str) -> Budget:
    """3 or "3 bits", "1.8MB" (B, kB, MB, GB: powers of 1000), "3.2ms"; Misuse for what is none of these."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found.group(2).lower() not in _FACTORS or not float(found.group(1)):
        raise Misuse(f"budget {text!r} is none.", "Give average bits (3), bytes (1.8MB) or milliseconds (3.2ms).")
    unit, factor = _FACTORS[found.group(2).lower()]
    return Budget(float(found.group(1)) * factor, unit)


@dataclass(frozen=True)
class Prices:
    """What layers cost, in the unit of the budget. `fixed`: all that is not searched."""

    unit: Unit
    fixed: float = 0.0
    sizes: Mapping[str, tuple[int, int]] | None = None
    device: DeviceTable | None = None

    def of(self, layers: Mapping[str, LayerPolicy], *, rows: int, bits: float, share: float, group: int = 0) -> float:
        """Of layers that read one input of `rows` tokens a sample: `share` of all bits' weights times `bits`, or the
        bytes that a checkpoint holds of them, or milliseconds a step in timestep group `group`.

        Milliseconds are those of a linear for that group's width. Raises Misuse for one that was not measured.
        """
        if self.unit == "bits":
            return share * bits
        sizes = self.sizes or {}
        if self.unit == "bytes":
            return float(sum(stored_bytes(layer, sizes[name]) for name, layer in layers.items()))
        if self.device is None:
            raise ValueError("prices in milliseconds need a device table")
        linears = as_run(layers, sizes, rows * self.device.batch, group=group)
        return sum(self.device.milliseconds(linear) for linear in linears)


def rising(costs: Sequence[float]) -> list[float]:
    """Costs of one layer by rising activation bits: more bits never cost less, so that noise of a measurement does not
    make them look cheaper."""
    return np.maximum.accumulate(np.asarray(costs, np.float64)).tolist()


def check_is_possible(budget: Budget, least: float, alike: Sequence[float]) -> None:
    """Misuse where even the cheapest choices of all layers, `least`, are above the budget.

    `alike`: what all layers cost at one width or format, which is told where no one can know it beforehand: where all
    cost the same, there is nothing to gain.
    """
    if least > budget.amount * (1 + 1e-12) + 1e-9:
        # Rounded up, so that what is said suffices.
        digits = {"bits": 2, "bytes": 0, "milliseconds": 3}[budget.unit]
        enough = math.ceil(round(least * 10**digits, 6)) / 10**digits
        raise Misuse(
            f"budget {budget}: the least that this search can reach is {shown(enough, budget.unit)}.",
            "Give that or more, or let it choose from less: --bits, --allocate weights, a base with lower ranks.",
        )
    if budget.unit != "bits":
        from_, to = shown(min(alike), budget.unit), shown(max(alike), budget.unit)
        note(f"search: with all layers alike, the choices cost {from_} to {to}")
