"""The papers' claims, each confirmed or refuted by the cells of the methods table, seed by seed."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

FULL = "full precision"
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


def judge(claim: Claim, column: str, cells: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]) -> Verdict:
    """Compares both rows seed by seed: the same calibration set, noise and labels.

    cells: values of each seed, in one order for all, by (row, column); full precision has the column "". Two standard
    errors (of a sample; at least two seeds) beyond the margin decide.
    """
    better, worse = (cells.get((row, "" if row == FULL else column)) for row in (claim.better, claim.worse))
    if not better or not worse or len(better) != len(worse) or len(better) < 2:
        return Verdict(claim, column, "not measured", float("nan"), float("nan"))
    sign = -1.0 if claim.value in LESS_IS_BETTER else 1.0
    differences = np.array([sign * (b[claim.value] - w[claim.value]) for b, w in zip(better, worse, strict=True)])
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)
    beyond = mean - claim.margin
    word = "open" if abs(beyond) <= SURE * error else "confirmed" if beyond > 0 else "refuted"
    return Verdict(claim, column, word, mean, error)


def lines(claims: Sequence[Claim], cells: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]) -> list[str]:
    """A Markdown table: one line a claim and column."""
    out = ["| claim | at | value | difference | |", "| --- | --- | --- | --- | --- |"]
    for claim in claims:
        for column in claim.columns:
            verdict = judge(claim, column, cells)
            told = "" if verdict.word == "not measured" else f"{verdict.difference:+.2f} ± {verdict.error:.2f}"
            out.append(f"| {claim.text} | {column} | {claim.value} | {told} | {verdict.word} |")
    return out
