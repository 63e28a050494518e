"""The blocks of a DiT for one denoising step on a GPU: our ops with torch's attention, beside fp16 in torch.

Both sides: modulation from the conditioning, attention, MLP, gates and residual of all blocks, random weights of which
each block has its own copy. Without the embeddings and the last layer, which are a hundredth of the operations. Ours:
ternary weights, 8-bit activations, one modulation GEMM for all blocks, attention in fp16 by torch, the residual in
float32. What runs in a CUDA graph says so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from gpu.device import Contestant, Device, kernel
from gpu.gemm import FORMAT_BITS, WGMMA_CAPABILITY, Compiling, pack_fragments
from gpu.quantize import EPS, block_of
from gpu.rows import Row

from dit2deploy.base.errors import Failed
from dit2deploy.formats import TERNARY

LEAST_SQNR = 20.0  # dB, of our output against float32 with the same weights: what 8-bit activations leave and more
PARTS = 6  # of a block's modulation: shift, scale and gate, twice


@dataclass(frozen=True)
class Geometry:
    name: str
    depth: int
    hidden: int
    heads: int
    tokens: int
    batch: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(K, N) by name, in a block."""
        c = self.hidden
        sizes = {"modulation": (c, PARTS * c), "qkv": (c, 3 * c), "proj": (c, c), "fc1": (c, 4 * c), "fc2": (4 * c, c)}
        return sizes


DIT_XL_2 = Geometry("DiT-XL/2, 256 tokens, batch 2", depth=28, hidden=1152, heads=16, tokens=256, batch=2)


def rotated(weight: torch.Tensor, block: int) -> torch.Tensor:
    """weight [N, K] times the normalised block Hadamard matrix: what float layers hold where ours rotate x."""
    matrix = torch.ones(1, 1, dtype=weight.dtype, device=weight.device)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (weight.reshape(-1, block) @ matrix / block**0.5).reshape(weight.shape)


@dataclass(frozen=True)
class Linear:
    words: torch.Tensor  # packed, layout 2
    scale: torch.Tensor  # [N, 1]
    bias: torch.Tensor  # [N]
    dense: torch.Tensor  # [N, K] float32, of unrotated inputs


def linear(device: Device, k: int, n: int, random: np.random.Generator) -> Linear:
    codes = random.integers(-1, 1, (n, k), dtype=np.int8, endpoint=True)
    scale = device.tensor(np.full((n, 1), (1.5 / k) ** 0.5, np.float32))  # variance of a trit: 2 / 3
    dense = rotated(device.tensor(codes).float() * scale, block_of(k))
    bias = device.tensor(0.02 * random.standard_normal(n, dtype=np.float32))
    return Linear(device.tensor(pack_fragments(codes, TERNARY)), scale, bias, dense)


def attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, 3 C] -> [B, T, C] in qkv's dtype."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def float_block(x: torch.Tensor, condition: torch.Tensor, weights: dict[str, Any], heads: int) -> torch.Tensor:
    """A DiT block (Peebles and Xie 2022) in x's dtype; weights: (weight, bias) by name; condition [B, C]."""
    modulation = functional.linear(functional.silu(condition), *weights["modulation"]).unsqueeze(1).chunk(PARTS, -1)
    shift, scale, gate, shift2, scale2, gate2 = modulation
    normed = functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
    attended = attention(functional.linear(normed, *weights["qkv"]), heads)
    x = x + gate * functional.linear(attended, *weights["proj"])
    normed = functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale2) + shift2
    active = functional.gelu(functional.linear(normed, *weights["fc1"]), approximate="tanh")
    return x + gate2 * functional.linear(active, *weights["fc2"])


class Ours:
    """All blocks by our ops: buffers once, launches prepared; `run` fills and gives back x [B, T, C] float32.

    `kernels`: of the blocks' GEMMs, as in gemm.Ours.
    """

    def __init__(self, device: Device, geometry: Geometry, weights: dict[str, Linear], kernels: str = "mma") -> None:
        g, self.device, self.geometry = geometry, device, geometry
        b, t, c = g.batch, g.tokens, g.hidden

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=device.name)

        self.start, self.condition = torch.randn(b, t, c, device=device.name), torch.randn(b, c, device=device.name)
        self.x, self.y, self.attended = empty(b, t, c), empty(b, t, c), empty(b, t, c)
        self.qkv, wide = empty(b, t, 3 * c), empty(b, t, 4 * c)
        self.parts = empty(g.depth, PARTS, b, c)
        self.modulated = empty(b, g.depth * PARTS * c)
        narrow = empty(b, t, c, dtype=torch.int8), empty(b, t, 1)
        broad = empty(b, t, 4 * c, dtype=torch.int8), empty(b, t, 1)
        qmax, eps = torch.full((1,), 127.0, device=device.name), torch.full((1,), EPS, device=device.name)

        def quantize(
            op: str, inputs: list[torch.Tensor], outputs: tuple[torch.Tensor, ...], **own: str
        ) -> Callable[[], None]:
            attributes = {"block": block_of(inputs[0].shape[-1]), **own}
            return device.launcher(op, [*inputs, qmax], attributes, outputs)

        def gemm(
            codes: tuple[torch.Tensor, ...], of: Linear, y: torch.Tensor, kernels: str = kernels
        ) -> Callable[[], None]:
            # A copy of the weights: blocks do not share them in a cache.
            inputs = [*codes, of.words.clone(), of.scale, of.bias]
            attributes = {"bits": 8, "layout": kernel.FRAGMENT_ORDER}
            return device.launcher("TernaryGemm", inputs, attributes, [y], kernels)

        once = weights["modulation"]
        every = Linear(*(torch.cat([part] * g.depth) for part in (once.words, once.scale, once.bias)), once.dense)
        few = empty(b, c, dtype=torch.int8), empty(b, 1)
        modulate = gemm(few, every, self.modulated, "mma")  # of few tokens
        active = quantize("ActivationHadamardQuantize", [self.condition], few, activation="silu")
        self.modulation = [active, modulate]
        self.blocks = []
        for block in range(g.depth):
            shift, scale, gate, shift2, scale2, gate2 = self.parts[block]
            norm = [
                quantize("AdaLnHadamardQuantize", [self.x, *modulation, eps], narrow)
                for modulation in ((shift, scale), (shift2, scale2))
            ]
            before = [norm[0], gemm(narrow, weights["qkv"], self.qkv)]
            between = [quantize("HadamardQuantize", [self.attended], narrow), gemm(narrow, weights["proj"], self.y)]
            after = [norm[1], gemm(narrow, weights["fc1"], wide)]
            after += [quantize("ActivationHadamardQuantize", [wide], broad), gemm(broad, weights["fc2"], self.y)]
            self.blocks.append((before, between, gate.unsqueeze(1), after, gate2.unsqueeze(1)))

    def run(self) -> torch.Tensor:
        g = self.geometry
        self.x.copy_(self.start)
        for launch in self.modulation:
            launch()
        self.parts.copy_(self.modulated.view(g.batch, g.depth, PARTS, g.hidden).permute(1, 2, 0, 3))
        for before, between, gate, after, gate2 in self.blocks:
            for launch in before:
                launch()
            self.attended.copy_(attention(self.qkv.half(), g.heads))
            for launch in between:
                launch()
            self.x.addcmul_(gate, self.y)
            for launch in after:
                launch()
            self.x.addcmul_(gate2, self.y)
        return self.x


def in_torch(
    ours: Ours, weights: dict[str, Linear], dtype: torch.dtype, block: Callable[..., torch.Tensor]
) -> Callable[[], torch.Tensor]:
    """The same blocks in torch; each has its own copy of the weights."""
    g = ours.geometry
    layers = [
        {name: (of.dense.to(dtype, copy=True), of.bias.to(dtype)) for name, of in weights.items()}
        for _ in range(g.depth)
    ]
    start, condition = ours.start.to(dtype), ours.condition.to(dtype)

    def run() -> torch.Tensor:
        x = start
        for layer in layers:
            x = block(x, condition, layer, g.heads)
        return x

    return run


def on_wgmma(ours: Ours, weights: dict[str, Linear], given: torch.Tensor) -> Ours:
    """The same blocks with their GEMMs on wgmma. Raises Failed where they do not give what the others gave."""
    other = Ours(ours.device, ours.geometry, weights, "wgmma")
    other.start.copy_(ours.start)
    other.condition.copy_(ours.condition)
    same = other.run().clone()
    ours.device.synchronize()
    if not torch.equal(same, given):
        raise Failed(f"{ours.geometry.name}: wgmma gives other bits than mma.", "Run the section gemm first.")
    return other


def sqnr(exact: torch.Tensor, given: torch.Tensor) -> float:
    """Signal to noise in dB."""
    exact, given = exact.double(), given.double()
    return float(10 * torch.log10(exact.square().sum() / (given - exact).square().sum()))


def measure(device: Device, geometry: Geometry, *, seconds: float, compiling: Compiling) -> Iterator[Row]:
    """Checks our blocks against float32 and times them against fp16."""
    random = np.random.default_rng(0)
    weights = {name: linear(device, k, n, random) for name, (k, n) in geometry.linears().items()}
    ours = Ours(device, geometry, weights)
    given = ours.run().clone()
    device.synchronize()
    found = sqnr(in_torch(ours, weights, torch.float32, float_block)(), given)
    if not found >= LEAST_SQNR:
        raise Failed(f"{geometry.name}: {found:.1f} dB against float32.", "Run the sections gemm and quantize first.")
    eager = in_torch(ours, weights, torch.float16, float_block)
    contestants = [Contestant("ours", device.captured(ours.run)), Contestant("fp16 eager", eager)]
    contestants.append(Contestant("fp16 in a graph", device.captured(eager)))
    if device.capability() == WGMMA_CAPABILITY:
        contestants.append(Contestant("ours on wgmma", device.captured(on_wgmma(ours, weights, given).run)))
    half = {name: (of.dense.half(), of.bias.half()) for name, of in weights.items()}
    compiled = compiling.function(float_block, ours.start.half(), ours.condition.half(), half, geometry.heads)
    reasons = {}
    if isinstance(compiled, str):
        reasons["torch.compile fp16 in a graph"] = compiled
    else:
        run = in_torch(ours, weights, torch.float16, compiled)
        contestants.append(Contestant("torch.compile fp16 in a graph", device.captured(run)))
    cold = device.times(contestants, seconds=seconds)
    rows = geometry.batch * geometry.tokens
    sizes = geometry.linears()
    macs = sum(k * n * (geometry.batch if name == "modulation" else rows) for name, (k, n) in sizes.items())
    weighed = sum(k * n for k, n in sizes.values()) * FORMAT_BITS["ternary"] // 8
    yield Row(
        what="blocks of a step",
        of=geometry.name,
        shape={"batch": geometry.batch, "tokens": geometry.tokens, "depth": geometry.depth},
        operations=2 * macs * geometry.depth,
        bytes=weighed * geometry.depth,
        cold=cold,
        hot={},
        name="ours",
        baselines=tuple(contestant.name for contestant in contestants[1:]),
        reasons=reasons,
        sqnr_db=found,
    )


def bars(records: list[dict[str, Any]]) -> list[str]:
    baseline = "torch.compile fp16 in a graph"
    return [
        f"{record['of']}: {record['cold']['ratios'][baseline]['median']:.2f} times as fast as torch.compile"
        for record in records
        if record["what"] == "blocks of a step" and baseline in record["cold"]["ratios"]
    ]
