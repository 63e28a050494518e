"""The methods side by side as a picture: SQNR of single steps and of final images, a panel for each bit-width."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from methods.page import summary

from dit2deploy.evaluate.charts import COLOURS


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Writes the chart (SVG): dots are means over seeds, bars one standard deviation; the best method on top."""
    panels = [(column, _bars(result, column)) for column in dict.fromkeys(cell["column"] for cell in result["cells"])]
    heights = [len(bars) + 2 for _, bars in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 1 + 0.19 * sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axis, (column, bars) in zip(axes[:, 0], panels, strict=True):
        places = range(len(bars))
        for key, colour, marker, label in (
            ("step_sqnr_db", COLOURS["one"], "o", "single steps on full precision's trajectory"),
            ("sqnr_db", COLOURS["two"], "s", "final images from the same noise"),
        ):
            means, deviations = zip(*(values[key] for _, values in bars), strict=True)
            axis.errorbar(
                means, places, xerr=deviations, fmt=marker, ms=4, color=colour, elinewidth=1, capsize=2, label=label
            )
        axis.set_yticks(places, [name for name, _ in bars], fontsize=7)
        axis.set_title(column, fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
        axis.margins(y=0.03)
    axes[0, 0].legend(fontsize=7, loc="lower right")
    axes[-1, 0].set_xlabel("SQNR, dB")
    with pyplot.rc_context({"svg.hashsalt": "methods", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _bars(result: Mapping[str, Any], column: str) -> list[tuple[str, dict[str, list[float]]]]:
    """Names and summaries of the methods of a column, the least single-step SQNR first."""
    found = [
        (cell["row"], summary(list(cell["seeds"].values()))) for cell in result["cells"] if cell["column"] == column
    ]
    return sorted(found, key=lambda named: named[1]["step_sqnr_db"][0])
