"""One block of a transformer on its own: its recorded inputs and outputs, and the model's gradients at its output."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dit2deploy.base.progress import track
from dit2deploy.models.blocks import replaying
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.quantizers.walk import Calls, Reached


class Recorded(NamedTuple):
    """One call of a block: its inputs, the timestep group of each sample, and outputs float32 [B, n], flattened."""

    arguments: tuple
    keywords: Mapping[str, Any]
    group: torch.Tensor | None
    output: torch.Tensor
    given: Any = None  # the same outputs, as the block gives them

    def rows(self, chosen: torch.Tensor) -> "Recorded":
        """These samples alone; only for a call whose tensors all have an axis of samples first."""

        def of(value: Any) -> Any:
            return value[chosen] if isinstance(value, torch.Tensor) else value

        keywords = {name: of(value) for name, value in self.keywords.items()}
        return Recorded(tuple(map(of, self.arguments)), keywords, of(self.group), self.output[chosen])


def call_of(calls: Calls, index: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in calls.call(index).items()}


def tensors_of(output: Any) -> tuple[torch.Tensor, ...]:
    """The tensors that a block gives: one, or a tuple of them."""
    return (output,) if isinstance(output, torch.Tensor) else tuple(output)


def flat(output: Any) -> torch.Tensor:
    """[B, n]: all that a block gives, one row a sample."""
    return torch.cat([tensor.flatten(1) for tensor in tensors_of(output)], 1)


# By name of a block, what it gives at each call: quantized, exact.
Finished = Mapping[str, Sequence[tuple[Any, Any]]]


def record(
    quantized: torch.nn.Module,
    exact: torch.nn.Module,
    name: str,
    calls: Calls,
    groups: TimestepGroups,
    finished: Finished = MappingProxyType({}),
) -> list[Recorded]:
    """Inputs of the module `name` in `quantized` and its outputs in `exact`, another network, a call each: what is
    before the block is quantized, what it should give is not. Blocks in `finished` compute nothing."""
    inputs: list[tuple[tuple, dict, torch.Tensor | None]] = []
    outputs: list[Any] = []

    def enter(_module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        inputs.append((arguments, keywords, groups.index))
        raise Reached

    def leave(_module: torch.nn.Module, _arguments: tuple, output: Any) -> None:
        outputs.append(output)
        raise Reached

    hooks = (
        quantized.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True),
        exact.get_submodule(name).register_forward_hook(leave),
    )
    try:
        for index in track(range(len(calls)), f"record {name}"):
            for place, network in enumerate((quantized, exact)):
                blocks = [network.get_submodule(block) for block in finished]
                with torch.no_grad(), replaying(blocks, [held[index][place] for held in finished.values()]):
                    try:
                        network(**call_of(calls, index), return_dict=False)
                    except Reached:
                        continue
    finally:
        for hook in hooks:
            hook.remove()
    return [Recorded(*seen, flat(output), output) for seen, output in zip(inputs, outputs, strict=True)]


def merged(records: Sequence[Recorded]) -> Recorded:
    """All calls as one, for blocks whose tensors all have an axis of samples first."""

    def joined(values: Sequence[Any]) -> Any:
        return torch.cat(list(values)) if isinstance(values[0], torch.Tensor) else values[0]

    first = records[0]
    return Recorded(
        tuple(map(joined, zip(*(one.arguments for one in records), strict=True))),
        {name: joined([one.keywords[name] for one in records]) for name in first.keywords},
        joined([one.group for one in records]),
        joined([one.output for one in records]),
    )


def output_power(network: torch.nn.Module, name: str, calls: Calls, *, probes: int, seed: int) -> torch.Tensor:
    """E[g^2] float32 [B of all calls, n] for g = d(v . f) / dz over normal v: z is the output of the block `name`, f
    that of the network. [inferred] Random projections in the place of BRECQ's task loss, as in `fisher_scores`: the
    expectation is the diagonal of the Gauss-Newton matrix of a loss that has no gradient where nothing is quantized.
    """
    found = []
    for index in track(range(len(calls)), f"Fisher diagonal of {name}"):
        generator = torch.Generator().manual_seed(seed + index)
        with _leaves(network, name) as leaves:
            output = network(**call_of(calls, index), return_dict=False)[0]
            total = 0.0
            for probe in range(probes):
                v = torch.randn(output.shape, generator=generator)
                gradients = _gradients(output, leaves, v, retain_graph=probe + 1 < probes)
                total = total + flat(gradients).square()
        found.append(total / probes)
    return torch.cat(found)


def responses(
    network: torch.nn.Module, name: str, calls: Calls, changes: torch.Tensor, targets: Sequence[torch.Tensor]
) -> torch.Tensor:
    """J^T (f(z + d) - f(z)) float32 [B of all calls, n] for changes d [B of all calls, n] of the block's output z.

    To first order this is J^T J d: the gradient of half the squared error that the change makes in the network's output
    (FIMA-Q takes the Kullback-Leibler divergence of class probabilities, which a denoiser does not have [inferred]).
    `targets` are f(z), a call each.
    """
    found, at = [], 0
    for index in range(len(calls)):
        samples = len(targets[index])
        with _leaves(network, name, changes[at : at + samples]) as leaves:
            output = network(**call_of(calls, index), return_dict=False)[0]
            found.append(flat(_gradients(output, leaves, output.detach() - targets[index])))
        at += samples
    return torch.cat(found)


def _gradients(
    output: torch.Tensor, leaves: Sequence[torch.Tensor], v: torch.Tensor, *, retain_graph: bool = False
) -> tuple[torch.Tensor, ...]:
    """J^T v, with zeros for leaves that nothing reads: FLUX's last block has text tokens to give and no taker."""
    return torch.autograd.grad(output, leaves, v, retain_graph=retain_graph, materialize_grads=True)


@contextmanager
def _leaves(network: torch.nn.Module, name: str, change: torch.Tensor | None = None) -> Iterator[list[torch.Tensor]]:
    """Within, gradients are on and the block gives leaves, which the list holds after a forward: its outputs and, added
    to them, `change` [B, n]."""
    leaves: list[torch.Tensor] = []
    hook = network.get_submodule(name).register_forward_hook(partial(_cut, leaves, change))
    try:
        with torch.enable_grad():
            yield leaves
    finally:
        hook.remove()


def _cut(leaves: list[torch.Tensor], change: torch.Tensor | None, _module: Any, _arguments: tuple, output: Any) -> Any:
    at = 0
    for tensor in tensors_of(output):
        n = tensor[0].numel()
        added = 0.0 if change is None else change[:, at : at + n].reshape(tensor.shape)
        leaves.append((tensor.detach() + added).requires_grad_(True))
        at += n
    return leaves[0] if isinstance(output, torch.Tensor) else tuple(leaves)


def outputs(network: torch.nn.Module, calls: Calls) -> list[torch.Tensor]:
    """What the network gives, a call each."""
    with torch.no_grad():
        return [network(**call_of(calls, index), return_dict=False)[0] for index in range(len(calls))]


Draw = Callable[[], tuple[Recorded, torch.Tensor]]


def draws(records: Sequence[Recorded], *, mixed: bool, batch: int, generator: torch.Generator) -> Draw:
    """Gives what one iteration sees, with the numbers of its samples among those of all calls: `batch` random samples
    or, where not `mixed`, one random call, as not all tensors of other families have an axis of samples."""
    ends = torch.tensor([len(one.output) for one in records]).cumsum(0)
    whole = merged(records) if mixed else None

    def draw() -> tuple[Recorded, torch.Tensor]:
        if whole is not None:
            chosen = torch.randint(len(whole.output), (batch,), generator=generator)
            return whole.rows(chosen), chosen
        index = int(torch.randint(len(records), (1,), generator=generator))
        begin, end = int(ends[index]) - len(records[index].output), int(ends[index])
        return records[index], torch.arange(begin, end)

    return draw
