"""profile.json as charts: the files that stage profile writes and the figures of the report are the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dit2deploy.evaluate import charts

_LONGEST = 8  # op types shown by name


def figures(profile: Mapping[str, Any]) -> dict[str, Figure]:
    """ "latency", and "ops" and "roofline" where they were measured."""
    made = {"latency": latency(profile)}
    if profile["ops"]:
        made["ops"] = ops(profile)
    if profile["roofline"]:
        made["roofline"] = roofline(profile)
    return made


def write(profile: Mapping[str, Any], folder: Path) -> None:
    """Writes each figure as .svg and .png."""
    for name, figure in figures(profile).items():
        charts.save(figure, folder / name)


def headline(profile: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of latency with the headline's threads and batch, the engine first."""
    where = profile["headline"]
    return [row for row in profile["latency"] if all(row[key] == value for key, value in where.items())]


def latency(profile: Mapping[str, Any]) -> Figure:
    """Median of each contestant at the headline's setting, whiskers from the 10th to the 90th percentile."""
    return charts.bars(
        [
            charts.Bar(
                row["label"],
                row["p50_ms"],
                row["p10_ms"],
                row["p90_ms"],
                f"{row['p50_ms']:.3g} ms",
                "one" if row["name"] == "engine" else "three",
            )
            for row in headline(profile)
        ],
        unit="ms",
    )


def ops(profile: Mapping[str, Any]) -> Figure:
    """Milliseconds of a step by op type, the rest in one bar."""
    rows = profile["ops"]
    shown, rest = rows[:_LONGEST], rows[_LONGEST:]
    ours = {node["op"] for node in (profile["roofline"] or {}).get("ops", ())}
    bars = [
        charts.Bar(
            f"{row['op']} \u00d7 {row['nodes']}",
            row["ms"],
            text=f"{row['ms']:.3g} ms ({row['share']:.0%})",
            colour="one" if row["op"] in ours else "three",
        )
        for row in shown
    ]
    if rest:
        total, share = sum(row["ms"] for row in rest), sum(row["share"] for row in rest)
        bars.append(charts.Bar(f"{len(rest)} other op types", total, text=f"{total:.3g} ms ({share:.0%})"))
    return charts.bars(bars, unit="ms")


def roofline(profile: Mapping[str, Any]) -> Figure:
    """Each of our GEMM nodes below the measured roofs."""
    roof = profile["roofline"]
    kinds = list(dict.fromkeys(node["op"] for node in roof["ops"] if node["macs"]))
    return charts.roofline(
        [
            charts.Point(
                node["op"],
                node["macs"] / max(1, node["bytes"]),
                node["macs_per_second"],
                charts.SERIES[kinds.index(node["op"]) % len(charts.SERIES)],
            )
            for node in roof["ops"]
            if node["macs"]
        ],
        macs_per_second=roof["macs_per_second"],
        bytes_per_second=roof["bytes_per_second"],
    )
