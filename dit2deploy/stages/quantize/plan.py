"""What quantize holds in memory, layer by layer, and how a ceiling is divided: before anything is begun."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.memory import require
from dit2deploy.base.shown import gigabytes
from dit2deploy.models.blocks import blocks_of
from dit2deploy.models.cost import cost_of_call
from dit2deploy.models.family import Inputs
from dit2deploy.models.stream import bytes_of
from dit2deploy.quantizers.round_to_nearest import CHUNK

HESSIANS = 2 << 30  # bytes of Hessians in memory at once, where there is room
_CHUNKS = 24 * 4 * CHUNK  # temporaries of the work in chunks of rows; sorting ternary weights takes the most


@dataclass(frozen=True)
class Plan:
    """`keep`: bytes of the network's weights that stay in memory (None: all, they must); `hessians`: of one run."""

    keep: int | None
    hessians: int
    peak: int  # bytes that are needed beside what the process holds: at least those


def workspace(shape: tuple[int, int], layer: LayerPolicy) -> int:
    """Peak bytes of `quantize_linear` of a layer (N, K) that the policy quantizes, its Hessian included.

    Counted in the code and measured (tools/bench_memory.py): copies of the float32 weight, and for GPTQ the Hessian,
    its rotation and the float64 factor. A branch in the norm of the inputs makes that factor while the Hessian, damped,
    is there twice in float64.
    """
    n, k = shape
    copies = 3 if not layer.branch_leaves else 7
    moments = 40 if layer.branch_needs_moments else 28 if layer.rounding == "gptq" else 0
    return 4 * n * k * copies + moments * k * k + _CHUNKS


def make_plan(
    empty: torch.nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    policy: Policy,
    names: Iterable[str],
    *,
    call: Inputs | None,
    max_memory: int | None,
) -> Plan:
    """How `names`, layers of the skeleton `empty`, are quantized below the ceiling; Misuse where they cannot be.

    `call`: one of the calls that the network is walked over, where it is (for second moments, smoothing, permutations).
    """
    names = list(names)
    layers = {name: policy.layers[name] for name in names}
    dearest = max(names, key=lambda name: workspace(shapes[name], layers[name]), default="")
    working = workspace(shapes[dearest], layers[dearest]) if names else 0
    if why := _why_whole(policy, names):
        copies = 2 if any(layer.rounding == "adaround" for layer in layers.values()) else 1
        whole = copies * bytes_of(empty) + _largest_block(empty)
        require(
            f"quantize: {why} the whole network in memory, which",
            whole + working,
            max_memory,
            cure="Choose a rounding and a `hessian` that need no gradients, or a machine of that size.",
        )
        return Plan(keep=None, hessians=HESSIANS, peak=whole + working)
    needy = {name: 4 * shapes[name][1] ** 2 for name in names if layers[name].needs_moments}
    # Gathering holds a block, its Hessians and one product x^T x; then one layer is worked on beside the others' .
    largest = max(needy.values(), default=0)
    gathering = 0
    if call is not None:
        gathering = _largest_block(empty) + _outside(empty) + 2 * largest + cost_of_call(empty, call).activations
    least = max(gathering, working)
    try:
        spare = require(f"quantize: layer {dearest}", least, max_memory)
    except Misuse as error:
        if needy:
            raise Misuse(
                error.cause,
                f"{error.cure} Or let it be `--rounding nearest`: second moments of {dearest} alone take "
                f"{gigabytes(28 * shapes[dearest][1] ** 2)}.",
            ) from None
        raise
    hessians = max(largest, min(HESSIANS, sum(needy.values()), spare // 2 + largest))
    keep = max(0, spare - (hessians - largest))
    return Plan(keep=keep, hessians=hessians, peak=least + hessians - largest)


def _why_whole(policy: Policy, names: list[str]) -> str:
    if any(policy.layers[name].rounding == "adaround" for name in names):
        return "reconstruction (rounding `adaround`) takes two copies of"
    if any(policy.layers[name].hessian == "fisher" for name in names):
        return "Fisher scores take"
    return "a search of regions takes" if policy.has_regions else ""


def _largest_block(empty: torch.nn.Module) -> int:
    return max(map(bytes_of, blocks_of(empty).values()), default=bytes_of(empty))


def _outside(empty: torch.nn.Module) -> int:
    return bytes_of(empty) - sum(map(bytes_of, blocks_of(empty).values()))
