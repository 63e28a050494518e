"""How two runs are compared: SQNR, cosine and largest difference of each value, through Polygraphy's comparator."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator, IterationResult, RunResults
from polygraphy.logger import G_LOGGER

from dit2deploy.evaluate.fidelity import cosine, max_abs, sqnr_db
from dit2deploy.stages.parity.runners import OUTPUT

LARGEST_DB = 300.0  # stands for equality: JSON has no infinity
_SILENT = 1e-3  # of the mean power of a layer's channels
_USUAL = 3.0  # times the error of the channel that nine of ten are better than


@dataclass(frozen=True)
class Fidelity:
    """How close a value is to what it should be; false where it is below a threshold (None: there is none).

    `channels_db` [N], of layers, tells a wrong weight from a rounding tie that fell the other way: a weight spoils one
    channel in nearly every token, a tie spoils most channels of one token. It is the power of a channel over the
    squared median of its errors where these stand out from other channels', else LARGEST_DB. So one step of one int8
    code is found among ties that are a thousand times louder.
    """

    sqnr_db: float
    max_abs: float
    cosine: float
    channels_db: np.ndarray | None = None
    threshold_db: float | None = None
    channel_threshold_db: float | None = None

    @property
    def worst_channel_db(self) -> float | None:
        return None if self.channels_db is None else _bounded(self.channels_db.min())

    def __bool__(self) -> bool:
        if self.threshold_db is not None and self.sqnr_db < self.threshold_db:
            return False
        worst = self.worst_channel_db
        return worst is None or self.channel_threshold_db is None or worst >= self.channel_threshold_db

    def record(self) -> dict[str, float]:
        """As JSON, without thresholds."""
        names = ("sqnr_db", "worst_channel_db", "max_abs", "cosine")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def joined(self, other: "Fidelity") -> "Fidelity":
        """Of two steps: the worse of each measure, but the better of each channel: a wrong weight is wrong in every
        step, while all rows of one step may share a tie (embeddings of the timestep)."""
        channels = self.channels_db
        if channels is not None and other.channels_db is not None:
            channels = np.maximum(channels, other.channels_db)
        return replace(
            self,
            sqnr_db=min(self.sqnr_db, other.sqnr_db),
            max_abs=max(self.max_abs, other.max_abs),
            cosine=min(self.cosine, other.cosine),
            channels_db=channels,
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
        channels = _channels_db(reference, value)
        return replace(found, channels_db=channels, channel_threshold_db=self._channel_threshold_db)


def run(runner: BaseRunner, feeds: Sequence[Mapping[str, np.ndarray]]) -> RunResults:
    """All feeds through one runner."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results: Any = Comparator.run([runner], data_loader=[OrderedDict(feed) for feed in feeds])
    return results


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


def _channels_db(reference: np.ndarray, value: np.ndarray) -> np.ndarray:
    x = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
    y = value.reshape(x.shape).astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return np.full(x.shape[1], -LARGEST_DB)
    power = (x**2).mean(0)
    # A channel that is almost silent is measured by the others.
    power = np.maximum(power, _SILENT * power.mean())
    error = np.median(abs(y - x), axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.nan_to_num(error / np.sqrt(power), posinf=np.inf)
        # What nine of ten channels have is not one channel's: a tie in an input of all tokens (FLUX's guidance).
        usual = (error <= _USUAL * np.quantile(error, 0.9)) | (relative <= _USUAL * np.quantile(relative, 0.9))
        return np.clip(-20 * np.log10(np.where(usual, 0, relative)), -LARGEST_DB, LARGEST_DB)


def _bounded(decibels: float) -> float:
    return float(np.clip(decibels, -LARGEST_DB, LARGEST_DB))
