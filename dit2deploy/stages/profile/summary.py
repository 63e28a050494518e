"""profile.json as a plain-text table."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def summary(result: Mapping[str, Any]) -> str:
    """Latency of all contestants and settings, memory, the longest ops, and what was not measured."""
    machine = result["machine"]
    lines = [f"{result['target']} on {machine['cpu']}, {machine['cores']} cores, one denoising step", ""]
    header = ("", "threads", "batch", "p50 ms", "p90 ms", "p99 ms", "samples/s", "engine is")
    rows = [header, *(_latency_row(result, row) for row in result["latency"])]
    lines += aligned(rows)
    if result["memory"]:
        lines += ["", "memory added by opening and running (own + mapped from files)"]
        labels = {row["name"]: row["label"] for row in result["latency"]}
        lines += [
            f"  {labels[name]}: {held['anonymous_bytes'] / 1e6:.1f} MB + {held['file_bytes'] / 1e6:.1f} MB"
            for name, held in result["memory"].items()
        ]
    if result["ops"]:
        lines += ["", "time of a step by op"]
        rows = [
            (row["op"], f"{row['nodes']} x", f"{row['ms']:.3f} ms", f"{row['share']:.0%}") for row in result["ops"][:8]
        ]
        lines += aligned(rows)
    if result["roofline"]:
        roof = result["roofline"]
        lines += [
            "",
            f"measured peak: {roof['macs_per_second'] / 1e9:.0f} GMAC/s int8, "
            f"{roof['bytes_per_second'] / 1e9:.1f} GB/s ({roof['how']})",
        ]
        lines += aligned(
            [
                (
                    row["op"],
                    f"{row['macs_per_second'] / 1e9:.1f} GMAC/s",
                    f"{row['bytes_per_second'] / 1e9:.1f} GB/s",
                    f"{row['share']:.0%} of its bound",
                )
                for row in roof["by_op"]
            ]
        )
    lines += ["" if result["not_measured"] else None]
    lines += [f"not measured: {entry['what']}: {entry['reason']}" for entry in result["not_measured"]]
    return "\n".join(line for line in lines if line is not None)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as they must be: the first to the left, the others to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


Column = Callable[[Mapping[str, Any]], str]  # what a table shows of a row


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Column]) -> str:
    """Lines of text: the titles, then what each column shows of each row."""
    return "\n".join(aligned([tuple(columns), *(tuple(show(row) for show in columns.values()) for row in rows)]))


# Of rows with a baseline's time over an engine's, taken within each round (measure.py's `ratios`).
RATIO_COLUMNS: dict[str, Column] = {
    "as fast": lambda row: f"{row['ratio']:.2f}x",
    "quartiles": lambda row: f"{row['p25']:.2f}..{row['p75']:.2f}",
}


def _latency_row(result: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = next(
        (
            f"{entry['ratio']:.2f}x as fast"
            for entry in result["ratios"]
            if (entry["baseline"], entry["threads"], entry["batch"]) == (row["name"], row["threads"], row["batch"])
        ),
        "",
    )
    numbers = (f"{row[key]:.3f}" for key in ("p50_ms", "p90_ms", "p99_ms"))
    return row["label"], str(row["threads"]), str(row["batch"]), *numbers, f"{row['samples_per_second']:.1f}", ratio
