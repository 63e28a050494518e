"""Time, measured fairly on a shared machine: contestants take turns, and what counts is the middle and the spread."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WARM_UP = 3  # untimed runs of each contestant before the first round
PAUSE = 0.003  # seconds before each turn: thread pools of the one before stop spinning on the cores
FEWEST_ROUNDS = 5
METHOD = (
    "Contestants take turns in rounds. Each turn is a pause of 3 ms, one untimed run and one timed run. Ratios are "
    "taken within a round; medians and quartiles are over the rounds."
)


@dataclass(frozen=True)
class Contestant:
    """Something that runs one denoising step."""

    name: str
    label: str
    run: Callable[[], Any]


# Called with the contestant's name, and begin and end of a timed run in nanoseconds.
Told = Callable[[str, int, int], None]


def race(
    contestants: Sequence[Contestant], *, rounds: int, seconds: float = 60.0, told: Told | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each round, by contestant; the same number of rounds for each.

    Stops after `seconds` when at least FEWEST_ROUNDS were made.
    """
    for contestant in contestants:
        for _ in range(WARM_UP):
            contestant.run()
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    begin = time.monotonic()
    for made in range(rounds):
        if made >= FEWEST_ROUNDS and time.monotonic() - begin > seconds:
            break
        for contestant in contestants:
            time.sleep(PAUSE)
            contestant.run()
            start = time.perf_counter_ns()
            contestant.run()
            end = time.perf_counter_ns()
            times[contestant.name].append((end - start) / 1e6)
            if told is not None:
                told(contestant.name, start, end)
    return times


def statistics(milliseconds: Sequence[float], *, batch: int) -> dict[str, Any]:
    """Percentiles in milliseconds a step, and samples a second at the median."""
    p10, p25, p50, p75, p90, p99 = (float(p) for p in np.percentile(milliseconds, (10, 25, 50, 75, 90, 99)))
    return {
        "runs": len(milliseconds),
        "min_ms": float(min(milliseconds)),
        "p10_ms": p10,
        "p25_ms": p25,
        "p50_ms": p50,
        "p75_ms": p75,
        "p90_ms": p90,
        "p99_ms": p99,
        "samples_per_second": 1000 * batch / p50,
    }


def ratios(times: Mapping[str, Sequence[float]], engine: str) -> dict[str, dict[str, float]]:
    """How many times faster the engine is than each other contestant: median and quartiles over the rounds."""
    own = np.asarray(times[engine])
    found = {}
    for name, other in times.items():
        if name != engine:
            low, middle, high = (float(p) for p in np.percentile(np.asarray(other) / own, (25, 50, 75)))
            found[name] = {"ratio": middle, "p25": low, "p75": high}
    return found
