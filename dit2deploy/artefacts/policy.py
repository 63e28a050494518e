"""policy.json: what every linear layer becomes, fully resolved: no wildcards, no defaults elsewhere."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from dit2deploy.artefacts import schema
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_json
from dit2deploy.formats import by_name

FILE = "policy.json"
_CURE = "Write it anew with `dit2deploy search`."

Weight = Literal["ternary", "int3", "int4", "int8", "float"]
Grid = Literal["mid-tread", "mid-rise"]
BranchInit = Literal["residual", "weight", "alternating", "weighted", "refit", "salient"]

MOST_MID_RISE = 7  # bits: its codes are odd integers of an int8

# Fields of a layer that came after the first policies were written, and their defaults.
_LATER = {
    "grid": "mid-tread",
    "gain": "none",
    "branch_init": "alternating",
    "hessian": "uniform",
    "smoothing": 0.0,
    "smoothing_steps": "largest",
    "objective": "squared",
    "calls": "trajectory",
    "monarch": None,
    "regions": "token",
    "weight_bits": None,
    "log_bits": 0,
    "permutation": "none",
}
# Inits that need the moments of a layer's inputs -> what stands for them where there are none.
_OF_MOMENTS = {"weighted": "alternating", "refit": "weight", "salient": "residual"}


class MonarchGrid(NamedTuple):
    """A Monarch branch (TreeQ's GMB): blocks_in x blocks_out blocks of low rank, see quantizers/monarch.py."""

    blocks_in: int
    blocks_out: int
    rank: int  # of a block

    def parameters(self, n: int, k: int) -> int:
        """Numbers that the branch of a weight [n, k] holds, and its multiply-accumulates for a token."""
        return self.rank * (self.blocks_out * k + self.blocks_in * n)

    def fault(self, n: int, k: int) -> str:
        """Why this is no grid for a weight [n, k]; "" where it is one."""
        if min(self) < 1:
            return f"the Monarch grid {list(self)} has a number below 1"
        if k % self.blocks_in or n % self.blocks_out:
            return f"the Monarch grid {self.blocks_in} x {self.blocks_out} does not divide K = {k} and N = {n}"
        if self.rank > min(k // self.blocks_in, n // self.blocks_out):
            return f"the Monarch rank {self.rank} is above its blocks' {n // self.blocks_out} x {k // self.blocks_in}"
        return ""


def check_grid(bits: Iterable[int], grid: Grid) -> None:
    """Raises ValueError for activation bits that the grid does not have: codes are int8."""
    if grid == "mid-rise" and max(bits, default=1) > MOST_MID_RISE:
        raise ValueError(f"activation_bits: a mid-rise grid has at most {MOST_MID_RISE} bits")
    if grid == "mid-tread" and min(bits, default=8) < 2:
        raise ValueError("activation_bits: 1 bit takes the mid-rise grid, a mid-tread grid would hold nothing but 0")


def largest_code(bits: int, grid: Grid) -> int:
    """The largest activation code of a symmetric grid: of all integers, or (mid-rise) of the odd ones."""
    return 2 ** (bits if grid == "mid-rise" else bits - 1) - 1


class LayerPolicy(schema.Record):
    """One linear layer. A "float" layer is left as it is and has no other field of meaning."""

    weight: Weight
    group_size: Annotated[int, Field(ge=1)] | None = None  # along K; None: one scale an output channel
    activation_bits: tuple[Annotated[int, Field(ge=1, le=8)], ...] = ()  # one a timestep group
    clip: Literal["absmax", "gaussian"] = "absmax"
    # Levels of activations: b bits are 2^b - 1 of them, one at 0, or 2^b, none at 0. See ops/hadamard_quantize.py.
    grid: Grid = "mid-tread"
    # What the clip takes from the amplitude of inputs, weight scales give back; "none" or "clip": quantizers/gain.py.
    gain: Literal["none", "clip"] = "none"
    hadamard: Annotated[int, Field(ge=1)] = 1  # block of the Hadamard transform; 1: none
    low_rank: Annotated[int, Field(ge=0)] = 0  # rank of the side branch; 0: none
    rounding: Literal["nearest", "gptq", "adaround"] = "nearest"
    # Where branches come from, see quantizers/branches.py. "residual", "weight", "alternating": V1, V2 and V3 of
    # methods.md 3.3; "weighted": V3 in the norm of the layer's inputs (4.3); "refit": V2, and once more for what the
    # codes leave, in that norm; "salient": MPQ-DMv2's residual of input channels, a low-rank branch alone.
    branch_init: BranchInit = "alternating"
    # How the calibration's steps count in the second moments of the inputs; "fisher": AdaTSQ, quantizers/temporal.py.
    hessian: Literal["uniform", "fisher"] = "uniform"
    # SmoothQuant's alpha; 0: none. Its factors are folded into the layer before this one: quantizers/smoothing.py.
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0
    # How the calibration's steps count in smoothing's maxima of inputs; "correlation": PTQ4DiT, methods.md 6.7.
    smoothing_steps: Literal["largest", "correlation"] = "largest"
    # Of "adaround": what of a block's error counts, see quantizers/objective.py. "diagonal": BRECQ; "low_rank": FIMA-Q.
    objective: Literal["squared", "diagonal", "low_rank"] = "squared"
    # What the layer is calibrated on. "conditions": every timestep of the calibration set with every class, for layers
    # that read nothing else (TFMQ-DM, stages/quantize/conditions.py).
    calls: Literal["trajectory", "conditions"] = "trajectory"
    monarch: MonarchGrid | None = None  # a branch beside the low-rank one, or instead of it
    # Steps of the inputs. "token": one a token, found at run time; "gelu": two a timestep group, for values below and
    # above 0, found by calibration (TQ-DiT, quantizers/multi_region.py).
    regions: Literal["token", "gelu"] = "token"
    # Codes have no more bits than this, in words of the weight's format; None: all that the format holds.
    weight_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    # Twin-Log levels, 2**log_bits of an int4 or int8 layer's codes (LRQ-DiT, quantizers/twin_log.py); 0: all codes.
    log_bits: Annotated[int, Field(ge=0, le=7)] = 0
    # Of input channels, folded into the layer before: quantizers/permutation.py.
    permutation: Literal["none", "zigzag"] = "none"

    @model_validator(mode="after")
    def _grid_fits(self) -> "LayerPolicy":
        check_grid(self.activation_bits, self.grid)
        if self.monarch and self.branch_init == "salient":
            raise ValueError("branch_init: salient channels are a low-rank branch, there is no such Monarch branch")
        return self

    @property
    def is_quantized(self) -> bool:
        return self.weight != "float"

    @property
    def largest_codes(self) -> tuple[int, ...]:
        """Of activations, one a timestep group: qmax of HadamardQuantize."""
        return tuple(largest_code(bits, self.grid) for bits in self.activation_bits)

    @property
    def code_bits(self) -> int:
        """Width of signed integers that hold all codes of activations: `bits` of the GEMMs."""
        return max(self.largest_codes).bit_length() + 1

    @property
    def needs_moments(self) -> bool:
        """Whether the second moments of the layer's inputs decide about its tensors."""
        return self.is_quantized and (self.rounding == "gptq" or self.branch_needs_moments)

    @property
    def branch_needs_moments(self) -> bool:
        return bool(self.branch_leaves) and self.branch_init in _OF_MOMENTS

    @property
    def branch_leaves(self) -> tuple[str, ...]:
        """What a checkpoint holds of the layer's branches, by the last part of the names."""
        low_rank = ("down", "up") if self.low_rank else ()
        return low_rank + (("monarch_down", "monarch_up") if self.monarch else ())

    @property
    def without_moments(self) -> "LayerPolicy":
        """The nearest policy that can be tried without the moments of the layer's inputs."""
        init = _OF_MOMENTS.get(self.branch_init, self.branch_init)
        return self.model_copy(update={"rounding": "nearest", "branch_init": init})

    @model_serializer(mode="wrap")
    def _told(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the fields of _LATER that are at their defaults: a policy that does not use them stays the same to
        the last byte, and so do the hashes that older checkpoints and bundles hold of it."""
        told = serialize(self)
        return {name: value for name, value in told.items() if name not in _LATER or _LATER[name] != value}


class AttentionPolicy(schema.Record):
    """The two products of one attention as products of integers: Q K^T, and P V with P = softmax.

    Q and K have a step a token and V one a channel, of each head, found at run time; P has two steps a timestep group
    (TQ-DiT, quantizers/multi_region.py). Both tuples hold one width a timestep group.
    """

    bits: tuple[Annotated[int, Field(ge=2, le=8)], ...]  # of Q, K and V
    probability_bits: tuple[Annotated[int, Field(ge=2, le=8)], ...]  # of P


class Policy(schema.Record):
    """Every linear layer of one model, by module name, and the attentions whose products are quantized.

    Timestep group i holds the timesteps t (0 .. training steps) with t < timestep_bounds[i] that are in no group before
    it; the last bound is the number of training steps, and the last group holds it too (artefacts/timesteps.py).
    """

    schema_version: Literal[1] = 1
    kind: Literal["policy"] = "policy"
    method: str  # provenance only: nothing branches on it
    options: dict[str, Any] = {}
    seed: int = 0
    model: str  # class name of the transformer
    timestep_bounds: tuple[int, ...] = (1000,)
    layers: dict[str, LayerPolicy]
    attentions: dict[str, AttentionPolicy] = {}  # those that are not named stay as they are

    @model_serializer(mode="wrap")
    def _told(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without attentions where there are none, as policies were before these came: see LayerPolicy."""
        told = serialize(self)
        return told if self.attentions else {name: value for name, value in told.items() if name != "attentions"}

    @model_validator(mode="after")
    def _is_resolved(self) -> "Policy":
        if list(self.timestep_bounds) != sorted(set(self.timestep_bounds)) or not self.timestep_bounds:
            raise ValueError("timestep_bounds must rise")
        for name, layer in self.layers.items():
            if layer.is_quantized and len(layer.activation_bits) != len(self.timestep_bounds):
                raise ValueError(
                    f"layer {name} has {len(layer.activation_bits)} activation_bits for "
                    f"{len(self.timestep_bounds)} timestep groups"
                )
            if layer.hadamard & (layer.hadamard - 1):
                raise ValueError(f"layer {name}: the Hadamard block {layer.hadamard} is no power of two")
            if layer.regions != "token" and (layer.hadamard > 1 or layer.branch_leaves or layer.grid != "mid-tread"):
                raise ValueError(f"layer {name}: an input of two regions takes no rotation, branch or grid of its own")
        for name, attention in self.attentions.items():
            for bits in (attention.bits, attention.probability_bits):
                if len(bits) != len(self.timestep_bounds):
                    raise ValueError(
                        f"attention {name} has {len(bits)} bits for {len(self.timestep_bounds)} timestep groups"
                    )
        return self

    @property
    def has_regions(self) -> bool:
        """Whether something is quantized by steps of two regions, which calibration finds."""
        return bool(self.attentions) or any(
            layer.is_quantized and layer.regions != "token" for layer in self.layers.values()
        )

    def check_covers(self, model: str, linears: Mapping[str, tuple[int, int]], where: str = "the policy") -> None:
        """Raises Misuse unless the policy names exactly the linears (name -> (N, K)) of a model of its class."""
        if self.model != model:
            raise Misuse(f"{where}: is a policy for {self.model}, the model is a {model}.", _CURE)
        for name in linears:
            if name not in self.layers:
                raise Misuse(f"{where}: says nothing of layer {name}.", _CURE)
        for name, layer in self.layers.items():
            if name not in linears:
                raise Misuse(f"{where}: names layer {name}, which the model does not have.", _CURE)
            k = linears[name][1]
            if layer.is_quantized and k % layer.hadamard:
                raise Misuse(f"{where}: layer {name}: Hadamard block {layer.hadamard} does not divide K = {k}.", _CURE)
            if layer.is_quantized and layer.group_size and k % layer.group_size:
                raise Misuse(f"{where}: layer {name}: group size {layer.group_size} does not divide K = {k}.", _CURE)
            if layer.log_bits and not _holds_log_levels(layer):
                raise Misuse(
                    f"{where}: layer {name}: {layer.log_bits}-bit log levels are for rounding to nearest in a wider "
                    f"integer format, not for {layer.rounding} in {layer.weight}.",
                    "Give the layer int8 weights and the rounding `nearest`.",
                )
            if layer.is_quantized and layer.low_rank > min(linears[name]):
                raise Misuse(f"{where}: layer {name}: rank {layer.low_rank} is above its {linears[name]}.", _CURE)
            if layer.is_quantized and layer.monarch and (fault := layer.monarch.fault(*linears[name])):
                raise Misuse(f"{where}: layer {name}: {fault}.", _CURE)

    @property
    def sha256(self) -> str:
        return sha256_of_json(self.model_dump(mode="json"))

    def save(self, path: Path) -> None:
        schema.save(self, path)

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Raises Misuse for a file that is missing, broken or of a newer schema."""
        return schema.load(cls, path, cure=_CURE)


def _holds_log_levels(layer: LayerPolicy) -> bool:
    if layer.rounding != "nearest" or layer.weight_bits is not None or not layer.is_quantized:
        return False
    return 2**layer.log_bits <= 2 * by_name(layer.weight).high
