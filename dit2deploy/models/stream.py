"""Weights that need not all be in memory: those of a layer are read from disk when it is called, and dropped after."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from dit2deploy.base.progress import track
from dit2deploy.models.blocks import blocks_of

Read = Callable[[str], torch.Tensor]
_KEY = "_weights_on_disk"


class OnDisk:
    """Hooks of one module: its own tensors are there from the beginning of a forward to its end."""

    def __init__(self, module: torch.nn.Module, name: str, read: Read) -> None:
        self._module, self._name, self._read = module, name, read
        self._absent = dict(module._parameters), dict(module._buffers)
        self._users = 0
        module.register_forward_pre_hook(lambda *_: self.take())
        module.register_forward_hook(lambda *_: self.drop(), always_call=True)
        setattr(module, _KEY, self)

    def take(self) -> None:
        self._users += 1
        if self._users > 1:
            return
        with torch.inference_mode(False):
            for leaf in own_tensors(self._module):
                place(self._module, leaf, self._read(f"{self._name}.{leaf}" if self._name else leaf))

    def drop(self) -> None:
        self._users -= 1
        if self._users == 0:
            parameters, buffers = self._absent
            self._module._parameters.update(parameters)
            self._module._buffers.update(buffers)


def fill(module: torch.nn.Module, read: Read, *, keep: int | None = None) -> None:
    """Gives a module of fake weights its values, by state_dict key: all at once, or with `keep` only as many bytes.

    Beyond `keep`, layers (modules with a matrix of their own and no children) read theirs at each call, or for as long
    as `held` says. What stands before and after the blocks is read first, as every call of a block alone (see
    `quantizers.walk`) goes through it. Norms and tables that belong to no layer are always in memory.
    """
    inner = tuple(f"{name}." for name in blocks_of(module))
    layers = sorted(module.named_modules(), key=lambda entry: entry[0].startswith(inner))
    left = math.inf if keep is None else keep
    for name, layer in track(layers, "load"):
        own = own_tensors(layer)
        size = sum(tensor.nbytes for tensor in own.values())
        if next(layer.children(), None) is None and any(tensor.ndim > 1 for tensor in own.values()):
            if size > left:
                OnDisk(layer, name, read)
                continue
            left -= size
        for leaf in own:
            place(layer, leaf, read(f"{name}.{leaf}" if name else leaf))


@contextmanager
def held(*modules: torch.nn.Module) -> Iterator[None]:
    """Within, all layers of these modules have their weights in memory."""
    with ExitStack() as stack:
        for module in modules:
            for layer in module.modules():
                if (on_disk := getattr(layer, _KEY, None)) is not None:
                    on_disk.take()
                    stack.callback(on_disk.drop)
        yield


def bytes_of(module: torch.nn.Module) -> int:
    """Of the weights of a module with all that is in it, in memory."""
    return sum(value.nbytes for inner in module.modules() for value in own_tensors(inner).values())


def largest_layer(module: torch.nn.Module) -> int:
    """Bytes of the weights of the largest layer: the least that a network with weights on disk has in memory."""
    return max(sum(value.nbytes for value in own_tensors(inner).values()) for inner in module.modules())


def own_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers of a module, without those of its children."""
    skipped = module._non_persistent_buffers_set
    owned = {**module._parameters, **{name: v for name, v in module._buffers.items() if name not in skipped}}
    return {name: value for name, value in owned.items() if value is not None}


def place(module: torch.nn.Module, leaf: str, value: torch.Tensor) -> None:
    """Sets a parameter or buffer of the module itself."""
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value
