"""A network over a calibration set block by block: every weight is read once, and one block's are in memory at a time.

A forward through the whole network for each call would read all weights as often as there are calls. Here a block
serves all calls before the next one is touched. What it gives waits on disk (where TMPDIR says); for the next block the
network runs again from the start, and the blocks before give what they gave. Their files are mapped, so that nothing is
read but what the network uses: the outputs of the newest block, and of the last one of each list of blocks before
(FLUX: the double blocks'; Z-Image: the refiners'). Older outputs are gone, and NaN stands in their place: a network
with skips over several blocks is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dit2deploy.base.disk import scratch_folder, writing
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import report
from dit2deploy.models.blocks import blocks_of, replaying
from dit2deploy.models.stream import held

_CURE = "Set TMPDIR to a folder on a larger disk and run again: finished layers are kept."
See = Callable[[str, torch.Tensor, int], None]


class Calls(Protocol):
    """Calls of a network: a CalibrationSet, or what stands in for one."""

    def __len__(self) -> int: ...

    def call(self, index: int) -> dict[str, np.ndarray]:
        """Keyword arguments of one call, [B, ..] each."""
        ...


class Reached(Exception):
    """Ends a forward at the block that was waited for."""


def by_block(network: torch.nn.Module, names: Iterable[str]) -> list[list[str]]:
    """The layers in runs of one block each, in the network's order; those outside of blocks come last."""
    runs: dict[str, list[str]] = {block: [] for block in blocks_of(network)}
    outside = []
    for name in names:
        runs.get(_block_of(runs, name), outside).append(name)
    return [run for run in (*runs.values(), outside) if run]


def walk(network: torch.nn.Module, runs: Sequence[Sequence[str]], calls: Calls, see: See) -> Iterator[Sequence[str]]:
    """Runs the network over the calls; `see(name, x, call)` is given each input [.., K] of the layers in `runs`.

    `runs` are as `by_block` gives them; those of one block may be split further, and it then runs once for each. A run
    is yielded when all calls went through it. Raises Misuse for a layer that no call reaches.
    """
    blocks = blocks_of(network)
    wanted: dict[str, list[Sequence[str]]] = {}
    for run in runs:
        wanted.setdefault(_block_of(blocks, run[0]), []).append(run)
    # Blocks behind the last one that is asked for need not run, unless what is behind all blocks is asked for.
    order = list(blocks)
    if "" not in wanted:
        order = order[: max((order.index(block) for block in wanted), default=-1) + 1]
    passes = sum(len(wanted.get(block, ((),))) for block in [*order, *([""] if "" in wanted else [])])
    done, total = 0, passes * len(calls)
    report("gather inputs", 0, total)
    with scratch_folder() as folder:
        tape = _Tape(folder, blocks)
        for block in [*order, ""]:
            for run in wanted.get(block, [()] if block else []):
                with _watched(network, run) as (seen, at), held(*_modules(network, block)):
                    for index in range(len(calls)):
                        at(see, index)
                        _forward(network, block, tape, calls, index)
                        done += 1
                        report("gather inputs", done, total)
                for name in run:
                    if name not in seen:
                        raise Misuse(
                            f"layer {name}: no call of the calibration set reaches it.",
                            "Give it the rounding `nearest` and no smoothing in the policy.",
                        )
                if run:
                    yield run
            tape.finish(block)


def _block_of(blocks: Mapping[str, Any], layer: str) -> str:
    """The block that holds the layer; "" for one outside of blocks."""
    return next((block for block in blocks if layer.startswith(f"{block}.")), "")


def _modules(network: torch.nn.Module, block: str) -> list[torch.nn.Module]:
    return [network.get_submodule(block)] if block else []


@contextmanager
def _watched(network: torch.nn.Module, names: Sequence[str]) -> Iterator[tuple[set[str], Callable[[See, int], None]]]:
    """Yields the names whose layers were reached, and what says whom to tell of which call."""
    seen: set[str] = set()
    told: list[Any] = []

    def hook(name: str):
        def take(module: torch.nn.Module, arguments: tuple, keywords: Mapping[str, torch.Tensor]) -> None:
            seen.add(name)
            see, index = told
            see(name, arguments[0] if arguments else keywords["input"], index)

        return take

    def at(see: See, index: int) -> None:
        told[:] = see, index

    hooks = [network.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield seen, at
    finally:
        for handle in hooks:
            handle.remove()


def _forward(network: torch.nn.Module, block: str, tape: "_Tape", calls: Calls, index: int) -> None:
    """One call, up to the end of the block, whose output goes on the tape; all of it for the block ""."""

    def enter(_module: torch.nn.Module, arguments: tuple, keywords: Mapping[str, Any]) -> None:
        for value in (*arguments, *keywords.values()):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.isnan().any():
                raise Misuse(
                    f"{block}: its inputs are not finite: NaN comes from the model's weights, or the block reads the "
                    "output of a block long before it.",
                    "Check the weights; a network with long skips takes the rounding `nearest` and no smoothing.",
                )

    def leave(_module: torch.nn.Module, _arguments: tuple, output: Any) -> None:
        tape.write(block, index, output)
        raise Reached

    hooks = []
    if block:
        module = network.get_submodule(block)
        hooks = [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    call = {name: torch.from_numpy(value) for name, value in calls.call(index).items()}
    before = [network.get_submodule(name) for name in tape.blocks]
    try:
        with torch.no_grad(), replaying(before, tape.outputs(index)):
            network(**call, return_dict=False)
    except Reached:
        pass
    finally:
        for handle in hooks:
            handle.remove()


class _Tape:
    """What finished blocks gave at each call, in files; `blocks` are those that have given something."""

    def __init__(self, folder: Path, blocks: Iterable[str]) -> None:
        self._folder = folder
        self._order = list(blocks)
        self._shapes: dict[tuple[str, int], Any] = {}  # shape and dtype of each tensor of an output, None for none
        self.blocks: list[str] = []

    def _path(self, block: str, index: int, place: int) -> Path:
        return self._folder / f"{block}.{index}.{place}.npy"

    def write(self, block: str, index: int, output: Any) -> None:
        tensors = (output,) if isinstance(output, torch.Tensor) else tuple(output)
        for place, tensor in enumerate(tensors):
            if tensor is not None:
                path = self._path(block, index, place)
                with writing(path, tensor.nbytes, cure=_CURE):
                    np.save(path, tensor.detach().numpy(), allow_pickle=False)
        told = [None if tensor is None else (tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        self._shapes[block, index] = told, isinstance(output, torch.Tensor)

    def finish(self, block: str) -> None:
        """All calls went through the block: outputs that no later block reads go."""
        if not any(name == block for name, _ in self._shapes):
            return
        before = next((name for name in reversed(self.blocks) if _list_of(name) == _list_of(block)), None)
        self.blocks.append(block)
        if before is not None:
            for file in self._folder.glob(f"{before}.*.npy"):
                file.unlink()

    def outputs(self, index: int) -> list[Any]:
        return [self._output(block, index) for block in self.blocks]

    def _output(self, block: str, index: int) -> Any:
        if (block, index) not in self._shapes:  # a call that did not reach it
            return None
        told, single = self._shapes[block, index]
        tensors = [entry and self._tensor(self._path(block, index, place), *entry) for place, entry in enumerate(told)]
        return tensors[0] if single else tuple(tensors)

    @staticmethod
    def _tensor(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if path.exists():
            return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        return torch.full((), float("nan"), dtype=dtype).expand(shape)


def _list_of(block: str) -> str:
    return block.rpartition(".")[0]
