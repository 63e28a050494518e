"""The Pareto front of a mixed-precision search as a chart."""

from collections.abc import Sequence
from pathlib import Path

from dit2deploy.evaluate import charts


def write(
    front: Sequence[tuple[float, float]],
    uniform: Sequence[tuple[float, float]],
    chosen: tuple[float, float],
    stem: Path,
    *,
    x_label: str = "average bits",
) -> None:
    """Writes STEM.png and STEM.svg: (cost, relative squared error) of the front, of all layers alike, and of the point
    that was chosen. Errors are drawn as signal to noise in dB."""
    from math import log10

    def line(label: str, points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> charts.Line:
        shown = [(cost, -10 * log10(error)) for cost, error in points if error > 0]
        return charts.Line(label, [cost for cost, _ in shown], [db for _, db in shown], colour, dashed)

    figure = charts.lines(
        [
            line("search", front, "one"),
            line("all layers alike", uniform, "three", dashed=True),
            line("chosen", [chosen], "two"),
        ],
        x_label=x_label,
        y_label="SQNR, dB",
    )
    charts.save(figure, stem)
