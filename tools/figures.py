"""Fills the marked regions of README.md from result files, so that no figure in it is typed by hand."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.files import write_bytes
from dit2deploy.evaluate.headline import headline, rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("tools") / "results"

EXAMPLE = """example:
  make demo && python tools/figures.py --collect build/demo     # tools/results/demo.json from the demo's bundle
  python tools/figures.py                                       # README.md from tools/results
  python tools/figures.py --check                               # exit code 1 where README.md differs

A region is <!-- figure:NAME --> ... <!-- /figure -->. Without its result file it stays empty."""

REGION = re.compile(r"(<!-- figure:([\w-]+) -->\n)(.*?)(<!-- /figure -->)", re.DOTALL)


@dataclass(frozen=True)
class Figure:
    """One region: the result file (in tools/results) it comes from, the command that makes that, and how it reads."""

    name: str
    file: str
    command: str
    render: Callable[[Mapping[str, Any]], str]


def demo(result: Mapping[str, Any]) -> str:
    return markdown((f"{result['model']}, {result['recipe']}", ""), rows(result))


def ratios(measured: Iterable[Mapping[str, Any]]) -> str:
    """Of bench_*.py: one line for a name and a baseline, a column for each setting, in order of appearance."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in measured:
        setting = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        for name in ("batch", "tokens"):
            setting += f", {name} {row[name]}" if name in row else ""
        cells.setdefault((row["name"], row["baseline"]), {})[setting] = f"{row['ratio']:.2f}\u00d7"
    settings = list(dict.fromkeys(setting for line in cells.values() for setting in line))
    lines = [(*key, *(line.get(setting, "") for setting in settings)) for key, line in cells.items()]
    return markdown(("ratio, above 1: ours is faster", "against", *settings), lines)


def gemm(result: Mapping[str, Any]) -> str:
    """The first shape that was measured, without the slower integer product; the result file has the others."""
    shape = result["rows"][0]["shape"]
    m, k, n = shape
    shown = (row for row in result["rows"] if row["shape"] == shape and not row["baseline"].endswith("u8 x u8"))
    return f"M = {m}, K = {k}, N = {n}:\n\n" + ratios(shown)


# What README shows of the blocks: ternary A4 against everybody, the others against what their bits compete with.
INT8 = ("ORT dynamic int8", "OpenVINO int8")
INT4 = ("ORT MatMulNBits 4 bit", "OpenVINO int4, dynamic int8")
RIVALS = {"ternary A8": INT8, "W3A3": INT8, "W4A4": INT8, "W4A8": INT4, "W8A8": INT8}


def blocks(result: Mapping[str, Any]) -> str:
    """Ratios, and below them the memory of each engine in one setting: the last."""
    shown = [row for row in result["rows"] if row["baseline"] in RIVALS.get(row["name"], (row["baseline"],))]
    last = result["engines"][-1]
    same = [row for row in result["engines"] if all(row[key] == last[key] for key in ("threads", "tokens"))]
    sizes = [
        (row["name"], f"{row['anonymous_bytes'] / 2**20:.0f} MiB", f"{row['file_bytes'] / 2**20:.0f} MiB")
        for row in same
    ]
    memory = markdown(("memory of a process beyond its imports", "its own", "mapped from files"), sizes)
    return (
        f"DiT-XL/2's geometry, blocks: {result['blocks']}, kernels for {result['isa']}:\n\n{ratios(shown)}\n\n{memory}"
    )


FIGURES = (
    Figure("demo", "demo.json", "make demo && python tools/figures.py --collect build/demo", demo),
    Figure("gemm", "bench_gemm.json", "python tools/bench_gemm.py --out tools/results/bench_gemm.json", gemm),
    Figure(
        "model",
        "bench_model.json",
        "python tools/bench_model.py --out tools/results/bench_model.json",
        lambda result: ratios(result["rows"]),
    ),
    Figure(
        "blocks",
        "bench_blocks.json",
        "python tools/bench_model.py --blocks 1 --out tools/results/bench_blocks.json",
        blocks,
    ),
)


def markdown(header: tuple, rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def filled(text: str, results: Path) -> str:
    """README's text with all regions filled; ValueError for a region that nobody knows."""
    known = {figure.name: figure for figure in FIGURES}

    def fill(match: re.Match) -> str:
        opening, name, _, closing = match.groups()
        if name not in known:
            raise ValueError(f"README.md has a region figure:{name}; known: {', '.join(known)}")
        figure = known[name]
        path = results / figure.file
        if not path.exists():
            return opening + closing
        result = json.loads(path.read_bytes())
        machine, date = result["machine"], result["date"][:10]
        source = (
            f"*{machine['cpu']}, {machine['cores']} cores, {date}; [{figure.file}]({RESULTS / figure.file}), made by "
            f"`{figure.command}`.*"
        )
        return f"{opening}{figure.render(result)}\n\n{source}\n{closing}"

    return REGION.sub(fill, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where README.md differs")
    parser.add_argument(
        "--collect", type=Path, metavar="BUNDLE", help="first write tools/results/demo.json from BUNDLE"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="default: this repository")
    options = parser.parse_args(arguments)
    readme, results = options.root / "README.md", options.root / RESULTS
    if options.collect:
        write_results(results / "demo.json", "demo", headline(Bundle.load(options.collect)))
    before = readme.read_text()
    after = filled(before, results)
    if options.check:
        if after != before:
            print(f"{readme} does not show what is in {results}; run: python tools/figures.py")
        return int(after != before)
    write_bytes(readme, after.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
