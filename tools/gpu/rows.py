"""What is kept of a measurement and how it reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gpu.device import Ceilings


@dataclass(frozen=True)
class Row:
    """One of our kernels in one setting, timed beside its baselines (microseconds by contestant)."""

    what: str
    of: str
    shape: Mapping[str, int]
    operations: int
    bytes: int
    cold: Mapping[str, Sequence[float]]
    hot: Mapping[str, float]
    name: str  # ours among the contestants
    baselines: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)  # of baselines that are not there
    error: float | None = None  # the largest, in units of what its roundings allow
    sqnr_db: float | None = None

    def record(self, ceilings: Ceilings) -> dict[str, Any]:
        """Plain values: times, ratios to each baseline, and the share of the bound that the ceilings set."""
        by = {"operations": self.operations / ceilings.int8_a_second, "bytes": self.bytes / ceilings.bytes_a_second}
        bound = max(by, key=by.__getitem__)
        cold = np.asarray(self.cold[self.name])
        median = float(np.median(cold))
        return {
            "what": self.what,
            "name": self.name,
            "of": self.of,
            "shape": dict(self.shape),
            "operations": self.operations,
            "bytes": self.bytes,
            "bound": bound,
            "bound_us": 1e6 * by[bound],
            "share_of_bound": 1e6 * by[bound] / median,
            "error_of_its_bound": self.error,
            "sqnr_db": self.sqnr_db,
            "rounds": len(cold),
            "cold": {
                "min_us": float(cold.min()),
                "median_us": median,
                "baselines_us": {name: float(np.median(self.cold[name])) for name in self.baselines},
                "ratios": {name: _quartiles(np.asarray(self.cold[name]) / cold) for name in self.baselines},
            },
            "hot": self._hot(),
            "not_measured": dict(self.reasons),
        }

    def _hot(self) -> dict[str, Any] | None:
        own = self.hot.get(self.name)
        if own is None:
            return None
        others = {name: self.hot[name] for name in self.baselines if name in self.hot}
        return {"us": own, "baselines_us": others, "ratios": {name: time / own for name, time in others.items()}}


def _quartiles(ratios: np.ndarray) -> dict[str, float]:
    low, middle, high = (float(value) for value in np.percentile(ratios, (25, 50, 75)))
    return {"median": middle, "p25": low, "p75": high}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for each record, a column for each baseline: its ratio cold and, after a slash, hot."""
    baselines = list(dict.fromkeys(name for record in records for name in record["cold"]["ratios"]))
    lines = [("", "of", "shape", "us cold", "least", "hot", "of bound", *baselines)]
    for record in records:
        cold, hot = record["cold"], record["hot"] or {"us": float("nan"), "ratios": {}}
        ratios = [
            f"{cold['ratios'][name]['median']:.2f}/{hot['ratios'].get(name, float('nan')):.2f}"
            if name in cold["ratios"]
            else "-"
            for name in baselines
        ]
        shape = " x ".join(map(str, record["shape"].values()))
        times = (f"{cold['median_us']:.1f}", f"{cold['min_us']:.1f}", f"{hot['us']:.1f}")
        share = f"{record['share_of_bound']:.0%} {record['bound'][:2]}"
        lines.append((record["what"], record["of"], shape, *times, share, *ratios))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
