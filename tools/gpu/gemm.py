"""Our GEMMs on a GPU beside torch's: fp16 and bf16 (cuBLAS), int8 (cuBLASLt through torch._int_mm), torch.compile."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from gpu.device import FLOATS, Contestant, Device, kernel
from gpu.rows import Row

from dit2deploy.base.errors import Failed
from dit2deploy.base.machine import cores
from dit2deploy.formats import FORMATS, INT3, TERNARY, Format, pack

TOKENS = (1, 16, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Shape:
    model: str
    layer: str
    k: int
    n: int


def linears(model: str, hidden: int) -> tuple[Shape, ...]:
    """The linears of a transformer block whose MLP is four times as wide."""
    sizes = (("qkv", hidden, 3 * hidden), ("proj", hidden, hidden), ("fc1", hidden, 4 * hidden))
    return tuple(Shape(model, layer, k, n) for layer, k, n in (*sizes, ("fc2", 4 * hidden, hidden)))


SHAPES = (
    *linears("DiT-XL/2", 1152),
    Shape("DiT-XL/2", "adaLN", 1152, 6912),
    *linears("SD3", 1536),
    *linears("FLUX", 3072),
)
FORMAT_BITS = {"ternary": 2, "int3": 3, "int4": 4, "int8": 8}  # of a weight in layout 2
WGMMA_CAPABILITY = "9.0"
RULE = "rule"  # the tactic that is the library's own choice among the others
FEW_TOKENS = 16  # which no kernel on wgmma computes
# What y is off by at most when it is written: of its value, and of the smallest.
ROUNDINGS = {"float32": (0.0, 1e-30), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 1e-30)}
# Packed codes: two a byte, of columns 32 apart, in runs of 64 (dit2deploy/ops/packed_codes.py, which takes more
# packages than a bare machine has).
PACKED_BITS, RUN = 4, 64
CHECKED = 96  # tokens that are compared: the first and the last tile's and some between


@dataclass
class Compiling:
    """torch.compile takes seconds for each shape: it stops when its share of the time is gone."""

    seconds: float
    mode: str = "max-autotune-no-cudagraphs"
    spent: float = 0.0

    def function(self, function: Callable[..., Any], *first: Any) -> Callable[..., Any] | str:
        """The function compiled, called once with arguments `first`; or why it is not."""
        if self.spent >= self.seconds:
            return f"the {self.seconds:.0f} s for torch.compile were over"
        begin = time.monotonic()
        torch.compiler.reset()
        compiled = torch.compile(function, mode=self.mode, dynamic=False)
        try:
            compiled(*first)
        except RuntimeError as error:  # torch's own errors are RuntimeErrors
            return f"torch.compile: {str(error).splitlines()[0]}"
        finally:
            self.spent += time.monotonic() - begin
        return compiled


def pack_fragments(codes: np.ndarray, fmt: Format) -> np.ndarray:
    """Weights [N, K] in the order of the GPU's kernels, int32 [strips, words]; by 32 outputs at a time, in threads."""
    pieces = [codes[i : i + 256] for i in range(0, len(codes), 256)]

    def one(piece: np.ndarray) -> np.ndarray:
        return kernel.relayout(fmt.name, pack(piece, fmt), piece.shape[1], layout=kernel.FRAGMENT_ORDER)

    with ThreadPoolExecutor(cores()) as pool:
        return np.concatenate(list(pool.map(one, pieces)))


@dataclass
class Weights:
    """Of one shape, on the device: codes int8 [N, K] and packed words by format, scales and bias, fp16."""

    device: Device
    shape: Shape
    formats: tuple[Format, ...] = FORMATS
    codes: dict[str, torch.Tensor] = field(default_factory=dict)
    words: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, k, random = self.shape.n, self.shape.k, np.random.default_rng(0)
        for fmt in self.formats:
            codes = random.integers(fmt.low, fmt.high, (n, k), dtype=np.int8, endpoint=True)
            self.codes[fmt.name] = self.device.tensor(codes)
            self.words[fmt.name] = self.device.tensor(pack_fragments(codes, fmt))
        self.scale = self.device.tensor(random.uniform(0.01, 0.1, (n, 1)).astype(np.float32))
        self.bias = self.device.tensor(random.standard_normal(n, dtype=np.float32))
        self.half = torch.randn(n, k, device=self.device.name).half()
        self.brain = self.half.bfloat16()


@dataclass(frozen=True)
class Ours:
    """One of our GEMMs: the kernels that every GPU runs (mma), or those on wgmma; the type of y; the tile shape; codes
    of 8 bits, a byte each, or of 4, packed."""

    fmt: Format
    kernels: str = "mma"
    floats: str = "float32"
    tactic: str = RULE
    packed: bool = False

    @property
    def name(self) -> str:
        return " ".join([self.fmt.name, *self._told("", "")])

    @property
    def what(self) -> str:
        return " ".join([f"{self.fmt.name} GEMM", *self._told("to ", "on ")])

    def _told(self, before_floats: str, before_kernels: str) -> Iterator[str]:
        """What is not the usual."""
        if self.packed:
            yield "of packed codes"
        if self.floats != "float32":
            yield before_floats + self.floats
        if self.kernels != "mma":
            yield before_kernels + self.kernels
        if self.tactic != RULE:
            yield f"by {self.tactic}"

    def others(self) -> Iterator[str]:
        """Names of what it is compared with among our own: each time one thing is the usual."""
        usual = {"tactic": RULE}, {"kernels": "mma", "tactic": RULE}, {"floats": "float32"}, {"packed": False}
        yield from dict.fromkeys(replace(self, **one).name for one in usual if replace(self, **one) != self)


def tactics_of(fmt: Format) -> list[str]:
    """Names of the tactics of a format's GEMM; the first has number 1."""
    (known,) = (entry["tactics"] for entry in kernel.describe() if entry["name"] == f"{fmt.title}Gemm")
    return known


def tile_shapes(fmt: Format, kernels: str) -> list[str]:
    """Tactics on those tensor cores, but the rule."""
    return [name for name in tactics_of(fmt) if name != RULE and name.endswith("_wgmma") == (kernels == "wgmma")]


def ours(
    device: Device, formats: tuple[Format, ...], k: int, tokens: int, floats: tuple[str, ...], *, tactics: bool
) -> list[Ours]:
    both = device.capability() == WGMMA_CAPABILITY and tokens > FEW_TOKENS
    kinds = ("mma", "wgmma") if both else ("mma",)
    narrow = [fmt for fmt in formats if fmt.bits <= PACKED_BITS and k % RUN == 0]
    found = [Ours(fmt, kernels, name) for name in floats for kernels in kinds for fmt in formats]
    found += [Ours(fmt, floats=name, packed=True) for name in floats for fmt in narrow]
    if tactics and tokens > FEW_TOKENS:
        found += [replace(one, tactic=name) for one in found for name in tile_shapes(one.fmt, one.kernels)]
    return found


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Codes int8 [M, K] of packed ones, int8 [M, K / 2]."""
    runs = packed.unflatten(-1, (-1, RUN // 2))
    return torch.stack(((runs << 4) >> 4, runs >> 4), -2).flatten(-3)


class Case:
    """One shape and number of tokens: the contestants, and what they must give."""

    def __init__(self, device: Device, weights: Weights, tokens: int, floats: tuple[str, ...]) -> None:
        self.device, self.weights, self.m = device, weights, tokens
        shape = weights.shape
        self.q = torch.randint(-127, 128, (tokens, shape.k), dtype=torch.int8, device=device.name)
        self.packed = torch.randint(-128, 128, (tokens, shape.k // 2), dtype=torch.int8, device=device.name)
        self.s = torch.rand(tokens, 1, device=device.name) * 0.09 + 0.01
        self.y = {name: torch.empty(tokens, shape.n, dtype=FLOATS[name][0], device=device.name) for name in floats}
        self.half = torch.randn(tokens, shape.k, device=device.name).half()

    def contestant(self, one: Ours) -> Contestant:
        w, op = self.weights, f"{one.fmt.title}Gemm"
        inputs = [self.packed if one.packed else self.q, self.s, w.words[one.fmt.name], w.scale, w.bias]
        attributes = {"layout": kernel.FRAGMENT_ORDER, "dtype": FLOATS[one.floats][1]}
        attributes |= {"bits": PACKED_BITS if one.packed else 8, "packed": int(one.packed)}
        tactic = tactics_of(one.fmt).index(one.tactic) + 1
        y = [self.y[one.floats]]
        return Contestant(one.name, self.device.launcher(op, inputs, attributes, y, one.kernels, tactic))

    def baselines(self, compiling: Compiling) -> tuple[list[Contestant], dict[str, str]]:
        """Those that run, and why the others do not."""
        w, reasons = self.weights, {}
        transposed = w.half.T
        found = [Contestant("cuBLAS fp16", lambda: torch.matmul(self.half, transposed))]
        if "bfloat16" in self.y:
            brain, wide = self.half.bfloat16(), w.brain.T
            found.append(Contestant("cuBLAS bf16", lambda: torch.matmul(brain, wide)))
        int8 = w.codes["int8"].T  # column-major, as cuBLASLt wants it
        try:
            torch._int_mm(self.q, int8)
            found.append(Contestant("cuBLASLt int8", lambda: torch._int_mm(self.q, int8)))
        except RuntimeError as error:  # it wants more than 16 tokens, and multiples of 8
            reasons["cuBLASLt int8"] = f"torch._int_mm: {str(error).splitlines()[0]}"
        arguments = self.half, w.half, w.bias.half()
        compiled = compiling.function(torch.nn.functional.linear, *arguments)
        if isinstance(compiled, str):
            reasons["torch.compile fp16"] = compiled
        else:
            found.append(Contestant("torch.compile fp16", lambda: compiled(*arguments)))
        return found, reasons

    def check(self, one: Ours) -> float:
        """Largest error in units of its bound (below 1 is right). Raises Failed where y is not the product.

        Integer sums are exact in float64; beside them y has five roundings of float32: int to float, ws, s, and bias;
        and one to its own type.
        """
        w, tokens, y = self.weights, self._checked(), self.y[one.floats]
        y.fill_(float("nan"))
        self.contestant(one).run()
        self.device.synchronize()
        q = unpacked(self.packed[tokens]) if one.packed else self.q[tokens]
        sums = q.double() @ w.codes[one.fmt.name].double().T
        scaled = sums * w.scale.double().T * self.s[tokens].double()
        exact = scaled + w.bias.double()
        relative, least = ROUNDINGS[one.floats]
        bound = 5 * 2.0**-24 * (scaled.abs() + w.bias.double().abs()) + relative * exact.abs() + least
        worst = float(((y[tokens].double() - exact).abs() / bound).max())
        if not worst < 1 or not bool(torch.isfinite(y).all()):
            shape = w.shape
            raise Failed(
                f"{one.fmt.title}Gemm, M {self.m}, K {shape.k}, N {shape.n}, {one.name}: off by {worst:.3g} times "
                "its bound.",
                "Run `pytest -m gpu`, and the same shape on the host's emulator (tests/plugins/test_cuda_gemm.py).",
            )
        return worst

    def _checked(self) -> torch.Tensor:
        if self.m <= CHECKED:
            return torch.arange(self.m, device=self.device.name)
        third = CHECKED // 3
        middle = torch.randint(0, self.m, (third,), device=self.device.name)
        ends = torch.arange(third, device=self.device.name)
        return torch.cat([ends, middle, self.m - 1 - ends])

    def bytes_of(self, one: Ours) -> int:
        """The least that a call moves: codes and packed weights read, y written."""
        shape, y = self.weights.shape, self.y[one.floats]
        return (
            self.m * shape.k // (2 if one.packed else 1) + shape.k * shape.n * FORMAT_BITS[one.fmt.name] // 8 + y.nbytes
        )


def measure(
    device: Device,
    *,
    shapes: tuple[Shape, ...],
    tokens: tuple[int, ...],
    seconds: float,
    compiling: Compiling,
    formats: tuple[Format, ...] = FORMATS,
    floats: tuple[str, ...] = tuple(FLOATS),
    tactics: bool = False,
) -> Iterator[Row]:
    """Checks and times; a row for each of our formats and types of y, beside it one of packed codes where weights are
    narrow enough, and on a Hopper one on wgmma.

    `tactics`: rows of each tile shape by itself, too; what a shape has no such kernel for is the rule once more.
    """
    each = seconds / (len(shapes) * len(tokens))
    for shape in shapes:
        weights = Weights(device, shape, formats)
        for m in tokens:
            case = Case(device, weights, m, floats)
            all_ours = ours(device, formats, shape.k, m, floats, tactics=tactics)
            errors = {one.name: case.check(one) for one in all_ours}
            baselines, reasons = case.baselines(compiling)
            contestants = [*map(case.contestant, all_ours), *baselines]
            cold = device.times(contestants, seconds=each)
            hot = device.hot_times(contestants, cold)
            for one in all_ours:
                others = tuple(name for name in one.others() if name in cold)
                yield Row(
                    what=one.what,
                    of=f"{shape.model} {shape.layer}",
                    shape={"m": m, "k": shape.k, "n": shape.n},
                    operations=2 * m * shape.k * shape.n,
                    bytes=case.bytes_of(one),
                    cold=cold,
                    hot=hot,
                    name=one.name,
                    baselines=(*others, *(baseline.name for baseline in baselines if _is_peer(baseline.name, one))),
                    reasons=reasons,
                    error=errors[one.name],
                )


def _is_peer(baseline: str, one: Ours) -> bool:
    """Whether a model would have the one in the place of the other: bfloat16 beside bfloat16."""
    if baseline.endswith("int8"):
        return True
    return baseline.endswith("bf16") == (one.floats == "bfloat16")


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """Which of the issue's bars hold, by what was measured; nothing of what was not."""
    lines = []
    for text, baseline, least, wanted in (
        ("M >= 1024, ternary and int3{}, against cuBLAS fp16", "cuBLAS fp16", 1.5, lambda m: m >= 1024),
        ("M >= 1024, ternary and int3{}, against cuBLASLt int8", "cuBLASLt int8", 0.9, lambda m: m >= 1024),
        ("M <= 16, ternary and int3{}, against cuBLAS fp16", "cuBLAS fp16", 4.0, lambda m: m <= FEW_TOKENS),
    ):
        kinds_of = [Ours(TERNARY, kernels, name) for name in ("float32", "float16") for kernels in ("mma", "wgmma")]
        kinds_of += [Ours(TERNARY, floats=name, packed=True) for name in ("float32", "float16")]
        for one in kinds_of:
            names = one.name, replace(one, fmt=INT3).name
            found = [
                row["cold"]["ratios"][baseline]["median"]
                for row in rows
                if row["name"] in names
                and row["of"].split()[0] in ("FLUX", "DiT-XL/2")
                and wanted(row["shape"]["m"])
                and baseline in row["cold"]["ratios"]
            ]
            if found:
                held = sum(ratio >= least for ratio in found)
                which = text.format(one.what.removeprefix("ternary GEMM"))
                lines.append(f"{which}: at least {least} in {held} of {len(found)} (least {min(found):.2f}x)")
    return lines
