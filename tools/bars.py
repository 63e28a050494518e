"""The bars for the CPU kernels, and what the result files say of them: the table in docs/cpu.md."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]  # of a file in tools/results
Results = Mapping[int, Result]  # by the number of blocks
Ratios = Callable[[Results], list[float]]

INT8, MATMUL_NBITS = "ORT dynamic int8", "ORT MatMulNBits 4 bit"
OPENVINO_INT8, OPENVINO_INT4 = "OpenVINO int8", "OpenVINO int4, dynamic int8"
TORCH, MATMUL_INTEGER = "torch fp32 eager", "ORT MatMulInteger u8 x s8"
BRANCH = ", rank 16"  # of the names of engines with a low-rank branch
GEMM, DIT_XL = 0, 28  # numbers of blocks, by which results are named: GEMMs alone, and DiT-XL/2


@dataclass(frozen=True)
class Bar:
    """`floor`, `goal` and `wall` (by arithmetic; 0: none) of all ratios that `measured` takes from results.

    They are those of a CPU with AVX-512 VBMI; `floor` 0: none.
    """

    what: str
    against: str
    floor: float
    goal: float
    wall: float
    measured: Ratios


def speed(own: str, baseline: str, blocks: int) -> Ratios:
    """Of a GEMM alone over shapes and threads, of a model's step over tokens and threads."""

    def ratios(results: Results) -> list[float]:
        rows = results[blocks]["rows"] if blocks in results else ()
        return [row["ratio"] for row in rows if (row["name"], row["baseline"]) == (own, baseline)]

    return ratios


def memory(own: str, baseline: str) -> Ratios:
    """Of the process beyond its imports, own and mapped, at 28 blocks: how many times less."""

    def ratios(results: Results) -> list[float]:
        sizes = {name: _by_setting(results, name, "anonymous_bytes", "file_bytes") for name in (own, baseline)}
        return [theirs / sizes[own][setting] for setting, theirs in sizes[baseline].items() if setting in sizes[own]]

    return ratios


def threads(own: str) -> Ratios:
    """The time of 1 thread over that of 2 at 28 blocks."""

    def ratios(results: Results) -> list[float]:
        times = _by_setting(results, own, "least_ms")
        return [time / times[2, tokens] for (count, tokens), time in times.items() if count == 1]

    return ratios


def _by_setting(results: Results, own: str, *keys: str) -> dict[tuple[int, int], float]:
    """By (threads, tokens): the sum of these numbers of an engine of 28 blocks."""
    engines = results[DIT_XL]["engines"] if DIT_XL in results else ()
    found = (row for row in engines if row["name"] == own)
    return {(row["threads"], row["tokens"]): sum(row[key] for key in keys) for row in found}


def _steps(own: str, against: Mapping[str, tuple[float, float, float]], *, blocks: Sequence[int] = (1,)) -> list[Bar]:
    return [
        Bar(f"{own}, {count} block{'s' if count > 1 else ''} of DiT-XL/2", name, *bar, speed(own, name, count))
        for name, bar in against.items()
        for count in blocks
    ]


TERNARY = {OPENVINO_INT8: (1.8, 2.2, 3.5), INT8: (2.0, 2.4, 3.8), TORCH: (7.5, 9.0, 14.0)}
BARS = (
    Bar("ternary A4, GEMM", MATMUL_INTEGER, 2.0, 2.6, 3.2, speed("ternary A4", MATMUL_INTEGER, GEMM)),
    Bar("ternary A3, GEMM", "ternary A4", 1.0, 1.2, 0, speed("ternary A3", "ternary A4", GEMM)),
    Bar("ternary A2, GEMM", "ternary A4", 1.0, 1.2, 0, speed("ternary A2", "ternary A4", GEMM)),
    *_steps("ternary A4", TERNARY, blocks=(1, DIT_XL)),
    *_steps(f"ternary A4{BRANCH}", TERNARY, blocks=(1, DIT_XL)),
    *_steps("ternary A8", {INT8: (1.3, 1.6, 1.9)}),
    *_steps("W3A3", {INT8: (1.1, 1.3, 0)}),
    *_steps("W4A4", {INT8: (1.1, 1.2, 1.3), OPENVINO_INT8: (1.0, 1.1, 1.2)}),
    *_steps("W8A8", {INT8: (1.1, 1.2, 1.3), OPENVINO_INT8: (1.0, 1.1, 1.2)}),
    *_steps("W4A8", {MATMUL_NBITS: (2.0, 2.3, 2.5), OPENVINO_INT4: (1.2, 1.3, 1.4)}),
    *(
        Bar(f"{own}, memory, 28 blocks", INT8, 3.0, 3.5, 3.7, memory(own, INT8))
        for own in ("ternary A4", f"ternary A4{BRANCH}", "ternary A4, ternary modulation")
    ),
    Bar("ternary A4, 28 blocks", "itself with 1 thread", 1.9, 1.95, 2.0, threads("ternary A4")),
)


def table(results: Results) -> list[tuple[str, ...]]:
    """A line a bar, the header first: what, against, floor, goal, wall, the ratios measured, what they reach."""
    lines = [("setting", "against", "floor", "goal", "wall", "measured", "reaches")]
    for bar in BARS:
        found = sorted(bar.measured(results))
        shown = f"{found[0]:.2f} .. {found[-1]:.2f}" if found else "not measured"
        limits = (f"{value:g}\u00d7" if value else "" for value in (bar.floor, bar.goal, bar.wall))
        lines.append((bar.what, bar.against, *limits, shown, _reached(bar, found)))
    return lines


def _reached(bar: Bar, found: list[float]) -> str:
    """By the least ratio."""
    if not found:
        return ""
    return "goal" if found[0] >= bar.goal else "floor" if found[0] >= bar.floor else "neither"
