"""HadamardQuantize and the ops around it on a GPU, beside the time that copying their bytes takes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gpu.device import FLOATS, Contestant, Device, kernel
from gpu.rows import Row

from dit2deploy.base.errors import Failed

TOKENS = (256, 1024, 4096, 16384)
LARGEST_BLOCK = 512  # of a rotation
CHECKED = 64  # tokens that are compared
EPS = 1e-6


@dataclass(frozen=True)
class Quantizer:
    """An op, its attributes beside the block, and the rows that it meets: width K, of which model."""

    op: str
    of: str
    k: int
    own: dict[str, str] = field(default_factory=dict)

    def attributes(self) -> dict[str, int | str]:
        return {"block": block_of(self.k), **self.own}


QUANTIZERS = (
    *(
        Quantizer(op, model, k)
        for model, hidden in (("DiT-XL/2", 1152), ("SD3", 1536), ("FLUX", 3072))
        for op, k in (
            ("HadamardQuantize", hidden),
            ("AdaLnHadamardQuantize", hidden),
            ("ActivationHadamardQuantize", 4 * hidden),
        )
    ),
    Quantizer("GatedActivationHadamardQuantize", "Z-Image", 10240, {"activation": "silu"}),
)


def block_of(k: int) -> int:
    return min(k & -k, LARGEST_BLOCK)


def inputs_of(device: Device, what: Quantizer, tokens: int, floats: str) -> list[torch.Tensor]:
    dtype = FLOATS[floats][0]
    x = torch.randn(tokens, what.k, device=device.name).to(dtype)
    qmax = torch.full((1,), 7.0, device=device.name)
    if what.op == "GatedActivationHadamardQuantize":
        return [x, torch.randn_like(x), qmax]
    if what.op != "AdaLnHadamardQuantize":
        return [x, qmax]
    shift, scale = (0.2 * torch.randn(1, what.k, device=device.name).to(dtype) for _ in range(2))
    return [x, shift, scale, torch.full((1,), EPS, device=device.name), qmax]


def check(what: Quantizer, inputs: list[torch.Tensor], q: torch.Tensor, s: torch.Tensor) -> None:
    """Raises Failed where codes or steps differ in a bit from those of the library's plain C++ kernel.

    It gets halves widened to float32, which loses nothing and is what the op does with them.
    """
    m, floats = len(q), str(inputs[0].dtype).removeprefix("torch.")
    tokens = np.unique(np.linspace(0, m - 1, min(m, CHECKED)).astype(int))
    host = [value.float().cpu().numpy() for value in inputs]
    host = [value[tokens] if len(value) == m else value for value in host]
    shapes = [(len(tokens), what.k), (len(tokens), 1)]
    wanted = kernel.run(what.op, host, what.attributes(), shapes, isa="portable")
    for name, given, want in zip("qs", (q, s), wanted, strict=True):
        different = int((given.cpu().numpy()[tokens] != want).sum())
        if different:
            raise Failed(
                f"{what.op}, M {m}, K {what.k}, {floats}: {different} of {want.size} {name} differ from the CPU's.",
                "Run `pytest -m gpu`, and the same shape on the host's emulator (tests/ops/test_numerics.py).",
            )


def measure(
    device: Device,
    *,
    quantizers: tuple[Quantizer, ...],
    tokens: tuple[int, ...],
    seconds: float,
    floats: tuple[str, ...] = tuple(FLOATS),
) -> Iterator[Row]:
    """Checks and times each op at each number of tokens, for each type of x."""
    each = seconds / (len(quantizers) * len(floats) * len(tokens))
    for what, kind in itertools.product(quantizers, floats):
        for m in tokens:
            inputs = inputs_of(device, what, m, kind)
            q = torch.full((m, what.k), 99, dtype=torch.int8, device=device.name)
            s = torch.full((m, 1), float("nan"), device=device.name)
            attributes = {**what.attributes(), "dtype": FLOATS[kind][1]}
            run = device.launcher(what.op, inputs, attributes, [q, s])
            run()
            device.synchronize()
            check(what, inputs, q, s)
            moved = sum(value.nbytes for value in (*inputs, q, s))
            source = torch.randint(-128, 128, (moved // 2,), dtype=torch.int8, device=device.name)
            target = torch.empty_like(source)
            contestants = [
                Contestant("ours", run),
                Contestant("copy of its bytes", lambda to=target, of=source: to.copy_(of)),
            ]
            cold = device.times(contestants, seconds=each)
            yield Row(
                what=what.op if kind == "float32" else f"{what.op} of {kind}",
                of=what.of,
                shape={"m": m, "k": what.k},
                operations=0,
                bytes=moved,
                cold=cold,
                hot=device.hot_times(contestants, cold),
                name="ours",
                baselines=("copy of its bytes",),
            )


def bars(records: list[dict[str, Any]]) -> list[str]:
    """How often the time is within 1.3 of the copy's."""
    ratios = [record["cold"]["ratios"].get("copy of its bytes", {}).get("median") for record in records]
    slower = [1 / ratio for ratio in ratios if ratio]
    if not slower:
        return []
    held = sum(ratio <= 1.3 for ratio in slower)
    return [f"quantizers against a copy of their bytes: within 1.3 in {held} of {len(slower)} (most {max(slower):.2f})"]
