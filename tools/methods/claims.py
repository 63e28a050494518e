"""The papers' claims, each confirmed or refuted by the cells of the methods table, seed by seed."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

FULL = "full precision"
Cells = Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]  # (row, column) -> seed -> values
SURE = 2.0  # standard errors that a mean difference must be away from zero


class Claim(NamedTuple):
    """`better` is above `worse` in `value` by more than `margin` (which is negative for "no worse than")."""

    text: str
    better: str
    worse: str
    columns: tuple[str, ...]
    value: str = "sqnr_db"
    margin: float = 0.0


# `value` counts upwards for a good method, but for these.
LESS_IS_BETTER = ("fd", "high_frequency_error", "seconds", "megabytes")


class Verdict(NamedTuple):
    claim: Claim
    column: str
    word: str  # "confirmed", "refuted", "open" or "not measured"
    difference: float  # mean over seeds, positive: as claimed
    error: float  # standard error of it


def judge(claim: Claim, column: str, cells: Cells) -> Verdict:
    """Compares both rows seed by seed: the same calibration set, noise and labels.

    cells: values by seed, by (row, column); full precision has the column "". Two standard errors (of a sample; at
    least two seeds that both rows have) beyond the margin decide.
    """
    better, worse = (cells.get((row, "" if row == FULL else column), {}) for row in (claim.better, claim.worse))
    shared = sorted(better.keys() & worse.keys())
    if len(shared) < 2:
        return Verdict(claim, column, "not measured", float("nan"), float("nan"))
    sign = -1.0 if claim.value in LESS_IS_BETTER else 1.0
    differences = np.array([sign * (better[seed][claim.value] - worse[seed][claim.value]) for seed in shared])
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)
    beyond = mean - claim.margin
    word = "open" if abs(beyond) <= SURE * error else "confirmed" if beyond > 0 else "refuted"
    return Verdict(claim, column, word, mean, error)


def told(claims: Sequence[Claim], cells: Cells) -> list[str]:
    """A Markdown table: one line a claim and column."""
    out = ["| claim | at | value | difference | |", "| --- | --- | --- | --- | --- |"]
    for claim in claims:
        for column in claim.columns:
            verdict = judge(claim, column, cells)
            by = "" if verdict.word == "not measured" else f"{verdict.difference:+.2f} ± {verdict.error:.2f}"
            out.append(f"| {claim.text} | {column} | {claim.value} | {by} | {verdict.word} |")
    return out


def _both(text: str, better: str, worse: str, columns: tuple[str, ...], margin: float = 0.0) -> tuple[Claim, ...]:
    """Of final images, and of single steps on full precision's trajectory: these vary less from seed to seed."""
    return tuple(Claim(text, better, worse, columns, value, margin) for value in ("sqnr_db", "step_sqnr_db"))


LOW, TERNARY = ("W4A4", "W3A3"), ("W1.58A4", "W1.58A3", "W1.58A2")
CLAIMS = (
    *_both("AdaTSQ is above SVDQuant", "AdaTSQ", "SVDQuant-like", LOW),
    *_both("AdaTSQ is above ViDiT-Q", "AdaTSQ", "ViDiT-Q-like", LOW),
    *_both("Fisher-weighted GPTQ is above plain GPTQ", "AdaTSQ GPTQ", "branch V3", (*LOW, "W1.58A4")),
    *_both("widths by timestep are above the best static search", "AdaTSQ", "TSS", ("W3A3", "W1.58A3")),
    *_both("widths by timestep are above one width for all", "AdaTSQ", "branch V3", ("W3A3", "W1.58A3")),
    *_both("RobuQ is above its own baseline", "RobuQ PTQ", "RobuQ baseline", TERNARY),
    *_both("mixed precision (AMPN) is above one width for all", "AMPN", "branch V3", ("W3A3", "W1.58A3", "W1.58A2")),
    Claim("W1.58A4 is usable: accuracy within 2 points", "branch V3", FULL, ("W1.58A4",), "accuracy", -0.02),
    Claim("trained W1.58A4: accuracy within 2 points", "RobuQ, trained", FULL, ("W1.58A4",), "accuracy", -0.02),
    *_both("training is above calibration alone", "RobuQ, trained", "branch V3", TERNARY),
    *_both("TSS is no worse than the additive knapsack", "TSS", "AMPN", ("W3A3", "W1.58A3"), margin=-0.1),
    *_both("GMB is above low rank at equal parameters", "GMB 4 x 4", "low rank 16", LOW),
    *_both("trained GMB is above trained low rank", "TreeQ GMB, trained", "low rank 16, trained", ("W3A3",)),
    Claim("GMB keeps more fine detail", "GMB 4 x 4", "low rank 16", LOW, "high_frequency_error"),
    *_both("TQ-DiT is above PTQ4DiT", "TQ-DiT", "PTQ4DiT", ("W6A6", "W8A8")),
    *_both("the same where both leave attention in float", "TQ-DiT, float attention", "PTQ4DiT", ("W6A6", "W8A8")),
    Claim("TQ-DiT is near full precision at W8A8: FD within 0.3", "TQ-DiT", FULL, ("W8A8",), "fd", -0.3),
    Claim("W4A4 is near lossless: FD within 0.3", "branch V3, no clip", FULL, ("W4A4",), "fd", -0.3),
    Claim("W4A4 is near lossless: accuracy within 1 point", "branch V3, no clip", FULL, ("W4A4",), "accuracy", -0.01),
    *_both("giving back what the clip takes gains", "branch V3, gain", "branch V3", ("W3A3", *TERNARY)),
    *_both("a clip is above none", "branch V3, gain", "branch V3, no clip", ("W3A3", "W1.58A3")),
    *_both("a branch fitted once more to what the codes leave gains", "branch refit", "branch V3", TERNARY),
)
