"""Layers read from disk compute what layers in memory do, and a walk by blocks sees what whole forwards see."""

import numpy as np
import pytest
import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.models import FAMILIES
from dit2deploy.models.blocks import blocks_of
from dit2deploy.models.load import linears_of, load_transformer
from dit2deploy.models.stream import held, own_tensors
from dit2deploy.quantizers.walk import by_block, walk
from tests.packing import tiny_module


class Calls:
    """Random calls of a family."""

    def __init__(self, family, config, count: int = 2) -> None:
        self._calls = [family.inputs(config, batch=2, seed=seed) for seed in range(count)]

    def __len__(self) -> int:
        return len(self._calls)

    def call(self, index: int) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self._calls[index].items()}


def in_memory(module: torch.nn.Module) -> set[str]:
    """Linears whose weights are real."""
    return {name for name in linears_of(module) if type(module.get_submodule(name).weight.data) is torch.Tensor}


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def saved(request, tmp_path):
    """A family, the folder of its tiny module, and calls."""
    module = tiny_module(request.param)
    module.save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model", Calls(request.param, module.config)


def test_a_streamed_network_computes_what_one_in_memory_does(saved):
    _, folder, calls = saved
    whole, streamed = load_transformer(folder)[0], load_transformer(folder, keep=0)[0]
    assert in_memory(whole) == set(linears_of(whole)) and not in_memory(streamed)
    call = {name: torch.from_numpy(value) for name, value in calls.call(0).items()}
    with torch.inference_mode():
        assert torch.equal(streamed(**call, return_dict=False)[0], whole(**call, return_dict=False)[0])
    assert not in_memory(streamed)
    with held(streamed):
        assert in_memory(streamed) == set(linears_of(whole))
    assert not in_memory(streamed)


def test_what_is_kept_fits_and_holds_what_is_outside_of_blocks_first(saved):
    _, folder, _ = saved
    whole = load_transformer(folder)[0]
    inside = tuple(f"{name}." for name in blocks_of(whole))
    outer = [name for name, module in whole.named_modules() if not name.startswith(inside)]
    size = sum(tensor.nbytes for name in outer for tensor in own_tensors(whole.get_submodule(name)).values())
    kept = in_memory(load_transformer(folder, keep=size)[0])
    assert {name for name in linears_of(whole) if not name.startswith(inside)} <= kept < set(linears_of(whole))


def test_a_walk_sees_the_inputs_of_whole_forwards_bit_for_bit(saved):
    _, folder, calls = saved
    network = load_transformer(folder)[0]
    names = list(linears_of(network))
    want: dict[tuple[str, int], torch.Tensor] = {}
    at = 0

    def keep(name):
        return lambda module, arguments: want.__setitem__((name, at), arguments[0].clone())

    hooks = [network.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    for at in range(len(calls)):
        with torch.no_grad():
            network(**{name: torch.from_numpy(value) for name, value in calls.call(at).items()})
    for handle in hooks:
        handle.remove()

    found: dict[tuple[str, int], torch.Tensor] = {}
    streamed = load_transformer(folder, keep=0)[0]
    runs = by_block(streamed, names)
    seen = []
    for run in walk(streamed, runs, calls, lambda name, x, index: found.__setitem__((name, index), x.clone())):
        seen += run
        assert not in_memory(streamed)  # a block's weights go before its run is worked on
    assert sorted(seen) == sorted(names)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], want[key]) for key in want)


class Skipping(torch.nn.Module):
    """Three blocks; the last one adds what the first one gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x, return_dict=False):
        first = self.layers[0](x)
        return (self.layers[2](self.layers[1](first) + first),)


class Wrapped(torch.nn.Module):
    def __init__(self, inner) -> None:
        super().__init__()
        self.linear = inner

    def forward(self, x):
        return self.linear(x)


class Ones:
    def __len__(self):
        return 1

    def call(self, index):
        return {"x": np.ones((2, 4), np.float32)}


def test_a_network_with_long_skips_is_refused():
    network = Skipping()
    network.layers = torch.nn.ModuleList(map(Wrapped, network.layers))
    names = [f"layers.{index}.linear" for index in range(3)]
    with pytest.raises(Misuse, match="a block long before it"):
        list(walk(network, by_block(network, names), Ones(), lambda *_: None))
