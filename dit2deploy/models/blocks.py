"""The blocks of a transformer: which they are, what they give in a call, and calls in which they give what is said."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


def blocks_of(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The transformer's blocks by name: the members of every ModuleList at its top, in order of registration."""
    return {
        f"{name}.{index}": block
        for name, child in module.named_children()
        if isinstance(child, torch.nn.ModuleList)
        for index, block in child.named_children()
    }


@contextmanager
def recording(blocks: Sequence[torch.nn.Module]) -> Iterator[dict[int, Any]]:
    """Yields a dictionary that holds, after a call, what each block gave, by its place in `blocks`."""
    given: dict[int, Any] = {}

    def keep(index: int, module: torch.nn.Module, arguments: tuple, output: Any) -> None:
        given[index] = output

    handles = [block.register_forward_hook(partial(keep, index)) for index, block in enumerate(blocks)]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaying(blocks: Sequence[torch.nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Within, these blocks give the recorded outputs and compute nothing."""
    for block, output in zip(blocks, outputs, strict=True):
        block.forward = partial(_given, output)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _given(output: Any, *_arguments: Any, **_keywords: Any) -> Any:
    return output
