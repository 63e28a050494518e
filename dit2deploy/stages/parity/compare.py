"""How two runs are compared: SQNR, cosine and largest difference of each value, through Polygraphy's comparator."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator, IterationResult, RunResults
from polygraphy.logger import G_LOGGER

from dit2deploy.evaluate.fidelity import cosine, max_abs, sqnr_db
from dit2deploy.stages.parity.runners import OUTPUT

LARGEST_DB = 300.0  # stands for equality: JSON has no infinity
_SILENT = 1e-3  # of the mean power of a layer's channels


@dataclass(frozen=True)
class Fidelity:
    """How close a value is to what it should be; false where it is below a threshold (None: there is none).

    `worst_channel_db`, of layers: the least SQNR over the last axis. A wrong weight spoils one output channel, a
    rounding tie that fell the other way spoils a token in all channels; over the whole value they look alike.
    """

    sqnr_db: float
    max_abs: float
    cosine: float
    worst_channel_db: float | None = None
    threshold_db: float | None = None
    channel_threshold_db: float | None = None

    def __bool__(self) -> bool:
        whole = self.threshold_db is None or self.sqnr_db >= self.threshold_db
        if self.channel_threshold_db is None or self.worst_channel_db is None:
            return whole
        return whole and self.worst_channel_db >= self.channel_threshold_db

    def record(self) -> dict[str, float]:
        """As JSON, without thresholds."""
        names = ("sqnr_db", "worst_channel_db", "max_abs", "cosine")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def worse(self, other: "Fidelity") -> "Fidelity":
        """The worse of each measure."""
        channels = (self.worst_channel_db, other.worst_channel_db)
        return replace(
            self,
            sqnr_db=min(self.sqnr_db, other.sqnr_db),
            max_abs=max(self.max_abs, other.max_abs),
            cosine=min(self.cosine, other.cosine),
            worst_channel_db=None if None in channels else min(channels),
        )


def measure(reference: np.ndarray, value: np.ndarray) -> Fidelity:
    """Without thresholds; NaN and infinity on either side give the worst values."""
    return Fidelity(
        sqnr_db=_bounded(sqnr_db(reference, value)),
        max_abs=min(max_abs(reference, value), float(np.finfo(np.float64).max)),
        cosine=cosine(reference, value),
    )


class CompareFidelity:
    """Polygraphy's `compare_func`: (reference's results, other's results) -> a Fidelity for each value of both."""

    def __init__(self, *, threshold_db: float | None = None, channel_threshold_db: float | None = None) -> None:
        self._threshold_db, self._channel_threshold_db = threshold_db, channel_threshold_db

    def __call__(self, reference: IterationResult, other: IterationResult) -> "OrderedDict[str, Fidelity]":
        return OrderedDict(
            (name, self._of(name, value, other[name])) for name, value in reference.items() if name in other
        )

    def _of(self, name: str, reference: np.ndarray, value: np.ndarray) -> Fidelity:
        found = replace(measure(reference, value), threshold_db=self._threshold_db)
        if name == OUTPUT:
            return found
        worst = _bounded(_worst_channel_db(reference, value))
        return replace(found, worst_channel_db=worst, channel_threshold_db=self._channel_threshold_db)


def run(runner: BaseRunner, feeds: Sequence[Mapping[str, np.ndarray]]) -> RunResults:
    """All feeds through one runner."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        return Comparator.run([runner], data_loader=[OrderedDict(feed) for feed in feeds])


def recorded(name: str, outputs: Sequence[Mapping[str, np.ndarray]]) -> RunResults:
    """Results that lie in a file, as if a runner of that name had given them."""
    results = RunResults()
    results.add([OrderedDict(values) for values in outputs], runner_name=name)
    return results


def compare(
    reference: RunResults,
    other: RunResults,
    *,
    threshold_db: float | None = None,
    channel_threshold_db: float | None = None,
) -> list[dict[str, Fidelity]]:
    """A Fidelity for each feed and each value that both results hold, in the reference's order.

    What `Comparator.compare_accuracy` would give, without the quantiles of every value that it computes to log them.
    """
    function = CompareFidelity(threshold_db=threshold_db, channel_threshold_db=channel_threshold_db)
    ((_, expected),), ((_, found),) = reference, other
    return [dict(function(x, y)) for x, y in zip(expected, found, strict=True)]


def _worst_channel_db(reference: np.ndarray, value: np.ndarray) -> float:
    if not (np.isfinite(reference).all() and np.isfinite(value).all()):
        return -np.inf
    x = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
    noise = ((value.reshape(x.shape) - x) ** 2).sum(0)
    signal = (x**2).sum(0)
    # A channel that is almost silent is measured by the others.
    signal = np.maximum(signal, _SILENT * signal.mean())
    wrong = noise > 0
    if not wrong.any():
        return np.inf
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(signal[wrong] / noise[wrong]).min())


def _bounded(decibels: float) -> float:
    return float(np.clip(decibels, -LARGEST_DB, LARGEST_DB))
