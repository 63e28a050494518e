"""Each family's description against diffusers' own module: roles, inputs, dynamic axes, swaps."""

import inspect

import pytest
import torch

from dit2deploy.models import FAMILIES
from dit2deploy.models.load import linears_of
from dit2deploy.models.pixart import PIXART
from tests.packing import tiny_module

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@each_family
def test_every_linear_has_a_role(family):
    roles = {name: family.role(name) for name in linears_of(tiny_module(family))}
    assert set(roles.values()) == {"block", "modulation", "embedding", "final"}, roles


@each_family
def test_inputs_fit_and_vary_in_the_dynamic_axes_only(family):
    module = tiny_module(family)
    first, second = (family.inputs(module.config, batch=2 + i, seed=0, second=bool(i)) for i in range(2))
    assert set(first) <= set(inspect.signature(module.forward).parameters)
    axes = family.axes(module.config)
    assert set(axes) <= set(first)
    for name in first:
        varying = {
            i for i, pair in enumerate(zip(first[name].shape, second[name].shape, strict=True)) if len({*pair}) > 1
        }
        assert varying == set(axes.get(name, {})), name
    for inputs in (first, second):
        with torch.no_grad():
            y = module(**inputs, return_dict=False)[0]
        assert y.shape[0] == inputs["timestep"].shape[0]
        assert torch.isfinite(y).all() and y.std() > 0.1


@each_family
def test_timesteps_cover_the_training_steps(family):
    timesteps = family.inputs(tiny_module(family).config, batch=8, seed=0)["timestep"].float() * family.timestep_scale
    assert timesteps.min() < 125 and 875 <= timesteps.max() < 1000


@each_family
def test_swapped_is_the_original(family):
    module = tiny_module(family)
    inputs = family.inputs(module.config, batch=2, seed=0, second=True)
    with torch.no_grad():
        want = module(**inputs, return_dict=False)[0]
        family.swap(module)
        got = module(**inputs, return_dict=False)[0]
    assert (want - got).abs().max() < 1e-5


def test_pixart_of_1024_pixels_is_told_its_sizes_and_a_text_its_length():
    """What diffusers' own forward computes from the dictionary; tokens behind the mask do not count."""
    module = tiny_module(PIXART, use_additional_conditions=True)
    inputs = PIXART.inputs(module.config, batch=3, seed=0)
    given = dict(inputs)
    sizes = {name: given.pop(name) for name in ("resolution", "aspect_ratio")}
    want = type(module).forward(module, **given, added_cond_kwargs=sizes, return_dict=False)[0]
    torch.testing.assert_close(module(**inputs, return_dict=False)[0], want)
    assert PIXART.arguments({**given, "added_cond_kwargs": sizes}).keys() == inputs.keys()
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][~inputs["encoder_attention_mask"].bool()] += 1
    assert not torch.equal(other["encoder_hidden_states"], inputs["encoder_hidden_states"])
    torch.testing.assert_close(module(**other, return_dict=False)[0], want)
    assert not torch.allclose(module(**{**inputs, "resolution": inputs["resolution"] / 2}, return_dict=False)[0], want)
