"""device.json: how long the linears of a model take on one device, by size, format, activation bits and branch."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.policy import LayerPolicy, MonarchGrid, Weight, largest_code
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_json

_CURE = "Make it anew with `dit2deploy measure-ops`."
FLOAT_BITS = 32  # of activations that are not quantized


class Linear(schema.Record):
    """What decides about the time of a linear layer. Layers that read one input and are alike run as one: `n` and
    `low_rank` are then the sums of theirs, as the fused form has it; with Monarch branches each runs for itself."""

    n: int
    k: int
    rows: int  # tokens of all samples of a call
    weight: Weight
    bits: int  # that hold the codes of activations; FLOAT_BITS for a layer that is not quantized
    group_size: int | None = None
    hadamard: int = 1
    low_rank: int = 0
    monarch: MonarchGrid | None = None

    def __str__(self) -> str:
        parts = [f"{self.n} x {self.k}, {self.rows} tokens, {self.weight}, {self.bits}-bit activations"]
        parts += [f"groups of {self.group_size}"] if self.group_size else []
        parts += [f"Hadamard {self.hadamard}"] if self.hadamard > 1 else []
        parts += [f"rank {self.low_rank}"] if self.low_rank else []
        parts += [f"Monarch {list(self.monarch)}"] if self.monarch else []
        return ", ".join(parts)


class LinearTime(schema.Record):
    """Milliseconds of one run, quantization of the input and the branch included: the middle and the least of rounds.
    The clip rule of activations is left out: it changes the time by less than runs differ."""

    linear: Linear
    ms: float
    least_ms: float
    rounds: int


class DeviceTable(schema.Record):
    """Times of one device. All but `times` must agree for tables to be extended."""

    schema_version: Literal[1] = 1
    kind: Literal["device_table"] = "device_table"
    device: str  # a name that people gave, or the processor's own
    target: str
    threads: int
    batch: int  # samples of a call; rows are tokens of one sample times this
    instructions: str  # the kernels that were in use
    library_sha256: str  # of the kernel library
    versions: dict[str, str] = {}
    date: str = ""
    method: str = ""
    times: tuple[LinearTime, ...] = ()

    @cached_property
    def _by_linear(self) -> dict[Linear, float]:
        return {time.linear: time.ms for time in self.times}

    def __contains__(self, linear: object) -> bool:
        return linear in self._by_linear

    def milliseconds(self, linear: Linear) -> float:
        """Raises Misuse for one that was not measured."""
        if linear not in self._by_linear:
            raise Misuse(
                f"the table of {self.device} has no time of a linear of {linear} (batch {self.batch}).",
                "Measure it: `dit2deploy measure-ops MODEL --policy POLICY -o TABLE` extends the table by what a "
                "policy has (--weights and --bits: more formats and widths); POLICY comes from `dit2deploy search` "
                "with the recipe that is --base here and the same options.",
            )
        return self._by_linear[linear]

    def extended(self, times: Iterable[LinearTime]) -> "DeviceTable":
        return self.model_copy(update={"times": (*self.times, *times)})

    @property
    def sha256(self) -> str:
        return sha256_of_json(self.model_dump(mode="json"))

    def save(self, path: Path) -> None:
        schema.save(self, path)

    @classmethod
    def load(cls, path: Path) -> "DeviceTable":
        """Raises Misuse for a file that is missing, broken or of a newer schema."""
        return schema.load(cls, path, cure=_CURE)


def as_run(
    layers: Mapping[str, LayerPolicy], sizes: Mapping[str, tuple[int, int]], rows: int, *, group: int
) -> list[Linear]:
    """The linears that an engine runs for layers that read one input, in timestep group `group`; `sizes` are (N, K)."""
    together: dict[LayerPolicy, list[str]] = {}
    for name, policy in layers.items():
        together.setdefault(policy, []).append(name)
    found = []
    for policy, names in together.items():
        shapes = [sizes[name] for name in names]
        parts = [[shape] for shape in shapes] if policy.monarch else [shapes]
        found += [_joined(policy, part, rows, group) for part in parts]
    return found


def _joined(policy: LayerPolicy, sizes: Sequence[tuple[int, int]], rows: int, group: int) -> Linear:
    n, k = sum(size[0] for size in sizes), sizes[0][1]
    if not policy.is_quantized:
        return Linear(n=n, k=k, rows=rows, weight="float", bits=FLOAT_BITS)
    return Linear(
        n=n,
        k=k,
        rows=rows,
        weight=policy.weight,
        bits=largest_code(policy.activation_bits[group], policy.grid).bit_length() + 1,
        group_size=policy.group_size,
        hadamard=policy.hadamard,
        low_rank=policy.low_rank * len(sizes),
        monarch=policy.monarch,
    )
