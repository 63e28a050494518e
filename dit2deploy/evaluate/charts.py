"""Charts of measurements in one restrained style: for files, and as SVG that follows the colours of a page."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dit2deploy.base.files import whole_file

WIDTH = 4.2  # inches: readable on a phone at its full width, and two abreast on a desktop

# Name of a page's CSS variable -> the colour on white, which stands where there is no page.
COLOURS = {
    "ink": "#1c2430",
    "muted": "#5b6675",
    "rule": "#d9dee5",
    "paper": "#ffffff",
    "one": "#0b62c4",
    "two": "#b4540a",
    "three": "#697586",
    "four": "#0f7b6c",
    "five": "#7a4fbf",
    "bad": "#c02434",
}
SERIES = ("one", "two", "three", "four", "five")

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "dit2deploy",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Bar:
    """`low` and `high`: the spread that its whisker shows."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    text: str = ""
    colour: str = "three"


@dataclass(frozen=True)
class Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "one"
    dashed: bool = False


@dataclass(frozen=True)
class Point:
    """One kernel in a roofline: MACs a byte, and MACs a second."""

    label: str
    intensity: float
    rate: float
    colour: str = "one"


def bars(items: Sequence[Bar], *, unit: str) -> Figure:
    """Horizontal bars with their values at the end; labels stand above their bars, so that long ones fit a phone."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.35 + 0.46 * len(items))
        longest = max([item.high if item.high is not None else item.value for item in items] + [1e-12])
        for index, item in enumerate(items):
            at = -index
            axes.barh(at, item.value, height=0.34, color=COLOURS[item.colour])
            end = item.value
            if item.low is not None and item.high is not None:
                axes.plot([item.low, item.high], [at, at], color=COLOURS["ink"], linewidth=1.1, solid_capstyle="butt")
                for edge in (item.low, item.high):
                    axes.plot([edge, edge], [at - 0.09, at + 0.09], color=COLOURS["ink"], linewidth=1.1)
                end = max(end, item.high)
            axes.text(0, at + 0.24, item.label, va="bottom", ha="left", fontsize=9, color=COLOURS["muted"])
            text = item.text or f"{item.value:.3g} {unit}"
            axes.text(end + 0.012 * longest, at, text, va="center", ha="left", fontsize=9.5)
        axes.set_xlim(0, longest * 1.3)
        axes.set_ylim(-len(items) + 0.55, 0.75)
        axes.axis("off")
        return figure


def lines(
    series: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    threshold: float | None = None,
    threshold_label: str = "",
    x_ticks: Mapping[float, str] | None = None,
    y_from: float | None = None,
    falling: bool = False,
    markers: bool = True,
) -> Figure:
    """Lines named by a legend above; `threshold` is a dashed rule; `falling` turns the x axis round (timesteps)."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2.75)
        for line in series:
            axes.plot(
                line.x,
                line.y,
                color=COLOURS[line.colour],
                linewidth=1.5,
                linestyle=(0, (4, 2)) if line.dashed else "-",
                marker="o" if markers else None,
                markersize=3.2,
                label=line.label,
            )
        low, high = _range([value for line in series for value in line.y], threshold, y_from)
        axes.set_ylim(low, high)
        if threshold is not None:
            axes.axhline(threshold, color=COLOURS["bad"], linewidth=1.1, linestyle=(0, (4, 3)))
            axes.annotate(
                threshold_label,
                (1, threshold),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=8.5,
                color=COLOURS["bad"],
            )
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if x_ticks is not None:
            axes.set_xticks(list(x_ticks), list(x_ticks.values()))
        if falling:
            axes.invert_xaxis()
        if len(series) > 1:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(-0.01, 1.0),
                ncol=2,
                borderaxespad=0.2,
                handlelength=1.2,
                columnspacing=1.0,
            )
        return figure


def roofline(points: Sequence[Point], *, macs_per_second: float, bytes_per_second: float) -> Figure:
    """Rates of kernels below the two roofs that were measured, both axes logarithmic."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.1)
        found = [point for point in points if point.intensity > 0 and point.rate > 0]
        knee = macs_per_second / bytes_per_second
        left = min([point.intensity for point in found] + [knee]) / 3
        right = max([point.intensity for point in found] + [knee]) * 4
        axes.plot(
            [left, knee, right],
            [left * bytes_per_second / 1e9, macs_per_second / 1e9, macs_per_second / 1e9],
            color=COLOURS["ink"],
            linewidth=1.4,
        )
        labelled: set[str] = set()
        for point in found:
            axes.plot(
                point.intensity,
                point.rate / 1e9,
                "o",
                markersize=5,
                markeredgewidth=0,
                alpha=0.75,
                color=COLOURS[point.colour],
                label=point.label if point.label not in labelled else None,
            )
            labelled.add(point.label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(top=macs_per_second / 1e9 * 3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("MACs a byte")
        axes.set_ylabel("GMAC/s")
        axes.grid()
        axes.tick_params(length=0, which="both")
        axes.annotate(
            f"int8 peak {macs_per_second / 1e9:.0f} GMAC/s",
            (right, macs_per_second / 1e9),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
        )
        axes.annotate(
            f"memory {bytes_per_second / 1e9:.0f} GB/s",
            (left, left * bytes_per_second / 1e9),
            xytext=(8, 2),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=8.5,
        )
        if labelled:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=2, borderaxespad=0.2, handletextpad=0.2)
        return figure


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Writes STEM.svg and STEM.png on white."""
    made = []
    for suffix in (".svg", ".png"):
        path = stem.with_name(stem.name + suffix)
        with whole_file(path) as temporary, matplotlib.rc_context(_STYLE):
            figure.savefig(
                temporary, format=suffix[1:], dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.08
            )
        made.append(path)
    return made[0], made[1]


def page_svg(figure: Figure, *, name: str, title: str) -> str:
    """An <svg> element for a page: colours are the page's variables, fonts its own, ids begin with `name`."""
    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(content, format="svg", bbox_inches="tight", pad_inches=0.04, metadata={"Date": None})
    text = content.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]+;?", "", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    _, _, view = text.partition('viewBox="')
    view = view[: view.index('"')]
    shown = _escaped(title)
    opening = (
        f'<svg viewBox="{view}" role="img" aria-labelledby="{name}-title" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink"><title id="{name}-title">{shown}</title>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).strip()


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0.11, 0.17, 0.87, 0.68) if height > 2 else (0.01, 0.02, 0.98, 0.96))


def _range(values: Sequence[float], threshold: float | None, start: float | None) -> tuple[float, float]:
    known = [value for value in values if np.isfinite(value)] + ([threshold] if threshold is not None else [])
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = 0.1 * max(high - low, 1.0)
    return (low - margin if start is None else min(start, low - margin)), high + margin


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
