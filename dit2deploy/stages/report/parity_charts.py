"""parity.json as charts: by layer, by timestep and along the trajectory, both questions in each."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dit2deploy.evaluate import charts

HIGHEST_DB = 160.0  # float32 holds no more; parity.json writes 300 for equality
_OWN, _COST = "engine against quantized", "quantized against full precision"


def figures(parity: Mapping[str, Any]) -> dict[str, tuple[Figure, str]]:
    """ "layers", "steps" and "trajectory", as far as they were run, each with its title."""
    own, cost = parity["engine_against_quantized"], parity["against_full_precision"]["quantized"]
    made = {}
    for name, title in (
        ("layers", "Fidelity of each quantized layer, in execution order"),
        ("steps", "Fidelity of the output of single steps"),
        ("trajectory", "Fidelity of the latents along the trajectory"),
    ):
        checks = [
            (label, check["values"], colour)
            for label, check, colour in ((_OWN, own[name], "one"), (_COST, cost[name], "two"))
            if check.get("values")
        ]
        if checks:
            threshold = own[name].get("threshold_db")
            draw = _layers if name == "layers" else _timesteps
            made[name] = (draw(checks, threshold), title)
    return made


Checks = Sequence[tuple[str, Sequence[Mapping[str, Any]], str]]


def _layers(checks: Checks, threshold: float | None) -> Figure:
    names = list(dict.fromkeys(value["layer"] for _, values, _ in checks for value in values))
    place = {name: index for index, name in enumerate(names)}  # a check may lack some of them
    series = [
        charts.Line(label, [place[value["layer"]] for value in values], _decibels(values), colour)
        for label, values, colour in checks
    ]
    return charts.lines(
        series,
        x_label="layer (ticks: first of each block)",
        y_label="SQNR, dB",
        threshold=threshold,
        threshold_label=_threshold_label(threshold),
        x_ticks=_blocks(names),
        y_from=0,
        markers=len(names) <= 120,
    )


def _timesteps(checks: Checks, threshold: float | None) -> Figure:
    series = [
        charts.Line(label, [value["timestep"] for value in values], _decibels(values), colour)
        for label, values, colour in checks
    ]
    return charts.lines(
        series,
        x_label="timestep (noise left, picture right)",
        y_label="SQNR, dB",
        threshold=threshold,
        threshold_label=_threshold_label(threshold),
        y_from=0,
        falling=True,
    )


def _decibels(values: Sequence[Mapping[str, Any]]) -> list[float]:
    return [max(-20.0, min(HIGHEST_DB, value["sqnr_db"])) for value in values]


def _threshold_label(threshold: float | None) -> str:
    return "" if threshold is None else f"engine must reach {threshold:g} dB"


def _blocks(names: Sequence[str]) -> dict[float, str]:
    """Index of the first layer of each block -> the block's number; at most ten ticks."""
    firsts: dict[str, int] = {}
    for index, name in enumerate(names):
        block = re.match(r"[\w]*blocks?\.(\d+)\.", name)
        if block:
            firsts.setdefault(block[0], index)
    every = -(-len(firsts) // 10) if firsts else 1
    return {
        float(index): block.strip(".").rpartition(".")[2]
        for position, (block, index) in enumerate(firsts.items())
        if position % every == 0
    }
