"""docs/methods.md from the result file: a table for each value, and the papers' claims."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from methods.cells import COST, QUALITY
from methods.claims import CLAIMS, FULL, SURE, Cells, told


def render(result: Mapping[str, Any], *, picture: str) -> str:
    """The document: a table for each value, methods down and bit-widths across; `picture` is what it shows first."""
    columns = list(dict.fromkeys(cell["column"] for cell in result["cells"]))
    rows = list(dict.fromkeys(cell["row"] for cell in result["cells"]))
    measured: Cells = {(cell["row"], cell["column"]): cell["seeds"] for cell in result["cells"]}
    by = {key: summary(list(seeds.values())) for key, seeds in measured.items()}
    full = summary(list(result["full_precision"].values()))
    most = len(result["full_precision"])
    fewer = sorted({len(seeds) for seeds in measured.values()} - {most})
    lines = [
        f"# Quantization methods on {result['model']}",
        "",
        f"Written by `{result['rendered_by']}` from a result file; do not edit.",
        f"Measured {result['date'][:10]} on {result['machine']['cpu']}, {result['machine']['cores']} cores, "
        f"torch {result['versions'].get('torch', '?')}: {result['samples']} samples, {result['steps']} DDIM steps, "
        f"guidance {result['guidance']:g}; mean ± standard deviation over {most} seed(s) of calibration, "
        f"branch and noise{f', of some cells {fewer[0]}' if fewer else ''}.",
        "",
        "All rows quantize the same layers: the linears of the blocks as the column says, the modulation and embedding",
        "linears as the recipe of that column does (int8 or int4 weights, 8-bit inputs), the last one not at all.",
        "Products of attention stay in float but in TQ-DiT's rows; W6 is 6-bit codes in int8 words, and stores 8 bits.",
        "Weights are symmetric with scales of least squared error, tokens have",
        "one dynamic scale; methods are rebuilt from their papers in these formats, hence “like”. Every row compiles.",
        "Smoothing is folded into the layers before, so the second linear of the MLP, after GELU, goes without. Of",
        "Q-DiT only the groups of weights are here. Bits are those of the block linears. AMPN, TSS and AdaTSQ choose",
        "the bits of activations at the column's average. Checkpoints compute by the compiled CPU kernels; the demo's",
        "first seeds were computed in PyTorch: the same codes, other rounding of floats.",
        "",
        f"Full precision: class accuracy {_cell(full['accuracy'], 3)}, FD {_cell(full['fd'], 2)}. FD is a Fréchet "
        "distance in the features of the model's own classifier, no FID: biased at so few samples, and comparable only "
        "within this page.",
        "",
        f"![SQNR of the methods at each bit-width]({picture})",
        "",
        "| method | what it is |",
        "|---|---|",
        *(f"| {row} | {result['rows'][row]} |" for row in rows),
    ]
    for key, title, digits in (*QUALITY, *COST):
        lines += [
            "",
            f"## {title[0].upper()}{title[1:]}",
            "",
            _line(["", *columns]),
            _line(["---"] * (1 + len(columns))),
        ]
        for row in rows:
            values = (by.get((row, column)) for column in columns)
            lines.append(_line([row, *("" if value is None else _cell(value[key], digits) for value in values)]))
    lines += [
        "",
        "## Claims",
        "",
        "Differences are taken seed by seed (the same calibration, noise and labels), positive as claimed, ± their",
        f"standard error; {SURE:g} of them beyond the claim's margin confirm or refute it, less leaves it open.",
        "",
        *told(CLAIMS, {**measured, (FULL, ""): result["full_precision"]}),
    ]
    return "\n".join(lines) + "\n"


def summary(cells: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Mean and standard deviation (of a sample, 0 for one) of each value over the seeds."""
    return {
        key: [
            float(np.mean([cell[key] for cell in cells])),
            float(np.std([cell[key] for cell in cells], ddof=1)) if len(cells) > 1 else 0.0,
        ]
        for key in cells[0]
    }


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Sequence[float], digits: int) -> str:
    mean, deviation = value
    text = f"{mean:.{digits}f}"
    return f"{text} ± {deviation:.{digits}f}" if deviation >= 0.5 * 10**-digits else text
