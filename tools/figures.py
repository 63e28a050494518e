"""Fills the marked regions of the documents from result files, so that no figure in them is typed by hand."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bars import GEMM, table

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.files import write_bytes
from dit2deploy.evaluate.headline import headline, rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("tools") / "results"
DOCUMENTS = ("README.md", "docs/cpu.md")

EXAMPLE = """example:
  make demo && python tools/figures.py --collect build/demo     # tools/results/demo.json from the demo's bundle
  python tools/figures.py                                       # the documents from tools/results
  python tools/figures.py --check                               # exit code 1 where one differs

A region is <!-- figure:NAME --> ... <!-- /figure -->. Without its result file it stays empty."""

REGION = re.compile(r"(<!-- figure:([\w-]+) -->\n)(.*?)(<!-- /figure -->)", re.DOTALL)


@dataclass(frozen=True)
class Figure:
    """One region: the result files (in tools/results) it comes from, and how those that are there read.

    Without the first of them the region stays empty. `before`: what has to run before the command that the last file
    tells of itself.
    """

    name: str
    files: tuple[str, ...]
    render: Callable[..., str]
    before: str = ""


def demo(result: Mapping[str, Any]) -> str:
    return markdown((f"{result['model']}, {result['recipe']}", ""), rows(result))


def ratios(measured: Iterable[Mapping[str, Any]]) -> str:
    """Of bench_*.py: one line for a name and a baseline, a column for each setting, in order of appearance; below it
    how far the quartiles are from the medians."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    spreads, rounds = [], set()
    for row in measured:
        setting = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        for name in ("batch", "tokens"):
            setting += f", {name} {row[name]}" if name in row else ""
        cells.setdefault((row["name"], row["baseline"]), {})[setting] = f"{row['ratio']:.2f}\u00d7"
        spreads.append(max(row["p75"] / row["ratio"], row["ratio"] / row["p25"]) - 1)
        rounds.add(row["runs"])
    settings = list(dict.fromkeys(setting for line in cells.values() for setting in line))
    lines = [(*key, *(line.get(setting, "") for setting in settings)) for key, line in cells.items()]
    counted = " to ".join(str(count) for count in sorted({min(rounds), max(rounds)}))
    told = f"Medians over {counted} rounds; quartiles are {median(spreads):.0%} off, {max(spreads):.0%} at most."
    return markdown(("ratio, above 1: ours is faster", "against", *settings), lines) + f"\n\n{told}"


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
        (row["name"], *(f"{row[kind] / 2**20:.0f} MiB" for kind in ("anonymous_bytes", "file_bytes", "stored_bytes")))
        for row in same
    ]
    memory = markdown(("memory of a process beyond its imports", "its own", "mapped from files", "files"), sizes)
    return (
        f"DiT-XL/2's geometry, blocks: {result['blocks']}, kernels for {result['isa']}:\n\n{ratios(shown)}\n\n{memory}"
    )


def steps(result: Mapping[str, Any]) -> str:
    return ratios(result["rows"])


def whole(result: Mapping[str, Any]) -> str:
    """A line an engine, of the fewest tokens: times by threads, how many times faster the first engine is, memory of
    the process and files."""
    tokens = min(row["tokens"] for row in result["engines"])
    engines = [row for row in result["engines"] if row["tokens"] == tokens]
    threads = list(dict.fromkeys(row["threads"] for row in engines))
    own = engines[0]["name"]
    faster = {
        (row["baseline"], row["threads"]): f"{row['ratio']:.2f}\u00d7"
        for row in result["rows"]
        if (row["name"], row["tokens"]) == (own, tokens)
    }
    lines = []
    for name in dict.fromkeys(row["name"] for row in engines):
        same = {row["threads"]: row for row in engines if row["name"] == name}
        last = same[threads[-1]]
        sizes = (last["anonymous_bytes"] + last["file_bytes"], last["stored_bytes"])
        times = (f"{same[count]['ms']:.0f} ms" for count in threads)
        ratio = " / ".join(faster.get((name, count), "") for count in threads).strip(" /")
        lines.append((name, *times, ratio, *(f"{size / 2**20:.0f} MiB" for size in sizes)))
    counted = (f"{count} thread{'s' if count > 1 else ''}" for count in threads)
    header = (f"one step, {tokens} tokens", *counted, f"{own} is faster", "memory", "files")
    return f"DiT-XL/2, {result['blocks']} blocks, kernels for {result['isa']}:\n\n{markdown(header, lines)}"


def memory(result: Mapping[str, Any]) -> str:
    """Stages of every case that one command made: minutes, of them the processor's, most memory of its own, bytes."""
    header = ("model, ceiling", "stage", "time", "processor time", "its own memory, at most", "made")
    lines = []
    for name, case in result["cases"].items():
        if not case["command"]:
            continue
        by_recipe = {"": {stage: case[stage] for stage in ("model", "calibrate") if stage in case}} | case["recipes"]
        for recipe, stages in by_recipe.items():
            for stage, row in stages.items():
                minutes = (f"{row[key] / 60:.1f} min" for key in ("seconds", "processor_seconds"))
                sizes = (f"{row[key] / 1e9:.2f} GB" for key in ("peak_anonymous_bytes", "out_bytes"))
                told = f"{name}, {case['max_memory'] or 'none'}"
                lines.append((told, f"{stage} {recipe}".strip(), *minutes, *sizes))
    return markdown(header, lines)


def nodes(result: Mapping[str, Any]) -> str:
    """Milliseconds of a step by op and threads, and the first over the last."""
    header = ("op", "nodes", *(f"{count} thread{'s' if count > 1 else ''}" for count in result["threads"]), "as fast")
    lines = [
        (row["op"], row["nodes"], *(f"{ms:.1f} ms" for ms in row["ms"]), f"{row['ms'][0] / row['ms'][-1]:.2f}\u00d7")
        for row in result["rows"]
    ]
    return f"{result['engine']}, {result['blocks']} blocks, {result['tokens']} tokens:\n\n{markdown(header, lines)}"


def reached(*results: Mapping[str, Any]) -> str:
    """The bars of tools/bars.py."""
    header, *lines = table({result.get("blocks", GEMM): result for result in results})
    return f"Kernels for {results[0]['isa']}.\n\n{markdown(header, lines)}"


FIGURES = (
    Figure("demo", ("demo.json",), demo, before="make demo && "),
    Figure("gemm", ("bench_gemm.json",), gemm),
    Figure("model", ("bench_model.json",), steps),
    Figure("blocks", ("bench_blocks.json",), blocks),
    Figure("dit-xl", ("bench_dit_xl.json",), whole),
    Figure("dit-xl-avx512", ("bench_dit_xl_avx512.json",), whole),
    Figure("dit-xl-ratios", ("bench_dit_xl.json",), blocks),
    Figure("nodes", ("bench_nodes.json",), nodes),
    Figure("memory", ("memory.json",), memory),
    Figure("bars", ("bench_gemm.json", "bench_blocks.json", "bench_dit_xl.json"), reached),
    Figure("bars-avx512", ("bench_gemm_avx512.json", "bench_blocks_avx512.json", "bench_dit_xl_avx512.json"), reached),
    Figure("blocks-avx512", ("bench_blocks_avx512.json",), blocks),
)


def markdown(header: tuple, rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def filled(text: str, results: Path, *, up: str = "") -> str:
    """A document's text with all regions filled, `up` being how its links come to the root; ValueError for a region
    that nobody knows."""
    known = {figure.name: figure for figure in FIGURES}

    def fill(match: re.Match) -> str:
        opening, name, _, closing = match.groups()
        if name not in known:
            raise ValueError(f"there is a region figure:{name}; known: {', '.join(known)}")
        figure = known[name]
        there = [file for file in figure.files if (results / file).exists()]
        if figure.files[0] not in there:
            return opening + closing
        found = [json.loads((results / file).read_bytes()) for file in there]
        return f"{opening}{figure.render(*found)}\n\n{source(figure, there, found[-1], up)}\n{closing}"

    return REGION.sub(fill, text)


def source(figure: Figure, there: Iterable[str], result: Mapping[str, Any], up: str) -> str:
    """Machine, date, files and command, in italics."""
    machine = result["machine"]
    load = f" (load {result['load_before']:.1f} before)" if "load_before" in result else ""
    files = ", ".join(f"[{file}]({up}{RESULTS / file})" for file in there)
    return (
        f"*{machine['cpu']}, {machine['cores']} cores{load}, {result['date'][:10]}; {files}, "
        f"made by `{figure.before}python tools/{result['command']}`.*"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a document differs")
    parser.add_argument(
        "--collect", type=Path, metavar="BUNDLE", help="first write tools/results/demo.json from BUNDLE"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="default: this repository")
    options = parser.parse_args(arguments)
    results = options.root / RESULTS
    if options.collect:
        write_results(results / "demo.json", "demo", headline(Bundle.load(options.collect)))
    differ = False
    for name in DOCUMENTS:
        path = options.root / name
        before = path.read_text()
        after = filled(before, results, up="../" * name.count("/"))
        differ |= after != before
        if options.check and after != before:
            print(f"{path} does not show what is in {results}; run: python tools/figures.py")
        elif after != before:
            write_bytes(path, after.encode())
    return int(options.check and differ)


if __name__ == "__main__":
    sys.exit(main())
