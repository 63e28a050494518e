"""Quantized checkpoints as PyTorch modules: the diffusers transformer with its linears swapped by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention

from dit2deploy.artefacts.checkpoint import CONFIG, Checkpoint
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.models.load import build, fake_parameters, known_family, linears_of
from dit2deploy.models.places import check_places
from dit2deploy.models.stream import fill
from dit2deploy.nn.attention import QuantAttention
from dit2deploy.nn.quant_linear import QuantForm, QuantLinear
from dit2deploy.nn.timestep_groups import TimestepGroups

_CURE = "Make it anew with `dit2deploy quantize`."
# What safetensors may hold for a tensor of the module: codes and factors as they are, other floats also narrower.
_EXACT = {torch.int32: ("I32",), torch.float16: ("F16",), torch.int64: ("I64",), torch.bool: ("BOOL",)}
_FLOATS = ("F32", "F16", "BF16")
_WIDTHS = ("qmax", "probability_qmax")  # what a policy says of its own


def empty_quantized(config: Mapping[str, Any], policy: Policy, *, form: QuantForm = "fused") -> torch.nn.Module:
    """The quantized transformer of a config with fake weights: no memory, whatever its size; ready to be exported.

    Real are the buffers that a constructor computes (position tables) and each layer's qmax. Raises Misuse for a policy
    of another model.
    """
    where = CONFIG
    with fake_parameters() as mode:
        module = build(config, where)
        policy.check_covers(config["_class_name"], linears_of(module))
        for layer in swap_linears(module, policy, form=form):
            with mode:
                for leaf in ("weight", *layer.policy.branch_leaves):
                    value = getattr(layer, leaf)
                    setattr(layer, leaf, torch.empty(value.shape, dtype=value.dtype))
    return module


def swap_linears(module: torch.nn.Module, policy: Policy, *, form: QuantForm = "fused") -> list[QuantLinear]:
    """Puts an empty QuantLinear in the place of each linear that the policy quantizes, and a QuantAttention into each
    attention that it names; attaches the timestep groups.

    `module` is a diffusers transformer of a known family whose linears are those of the policy. Returns the new layers.
    Raises Misuse for attentions that cannot be quantized, and for regions where the input is none of GELU.
    """
    check_places(module, policy)
    family = known_family(type(module).__name__, Path(CONFIG))
    groups, layers = TimestepGroups(policy.timestep_bounds, family.timestep_scale), []
    for name, (n, k) in linears_of(module).items():
        if policy.layers[name].is_quantized:
            layers.append(QuantLinear(k, n, policy=policy.layers[name], groups=groups, form=form).eval())
            module.set_submodule(name, layers[-1])
    for name, attention in policy.attentions.items():
        place = cast(Attention, module.get_submodule(name))
        place.set_processor(QuantAttention(attention, groups, place.processor))
    groups.attach(module)
    return layers


def load_quantized(checkpoint: Checkpoint, *, form: QuantForm = "fused", keep: int | None = None) -> torch.nn.Module:
    """The quantized PyTorch reference: called as the diffusers transformer is, in float32.

    `keep` as of `models.load.load_transformer`. Raises Misuse for a checkpoint whose tensors are not those that its
    config and policy ask for.
    """
    module = empty_quantized(checkpoint.config, checkpoint.policy, form=form)
    check_fits(module, checkpoint)
    dtypes = {name: value.dtype for name, value in module.state_dict().items()}
    fill(module, lambda name: torch.from_numpy(checkpoint.tensors.read(name)).to(dtypes[name]), keep=keep)
    return module


def check_fits(module: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Misuse unless the checkpoint's tensors are those of the module, by name, shape, dtype and activation width."""
    where, tensors, expected = checkpoint.folder, checkpoint.tensors, module.state_dict()
    for name, value in expected.items():
        if name not in tensors:
            raise Misuse(f"{where}: lacks the tensor {name}.", _CURE)
        if tensors.shape(name) != tuple(value.shape):
            raise Misuse(f"{where}: {name} is {list(tensors.shape(name))}, not {list(value.shape)}.", _CURE)
        if tensors.dtype(name) not in _EXACT.get(value.dtype, _FLOATS):
            raise Misuse(f"{where}: {name} has dtype {tensors.dtype(name)}, not that of {value.dtype}.", _CURE)
    for name in tensors:
        if name not in expected:
            raise Misuse(f"{where}: holds {name}, which its policy does not know.", _CURE)
    for name, value in expected.items():
        if name.rpartition(".")[2] in _WIDTHS and not torch.equal(torch.from_numpy(tensors.read(name)), value):
            raise Misuse(f"{where}: {name} is not what the policy's activation bits say.", _CURE)


def quantized_linears(module: torch.nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers by name, in order of registration."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantLinear)}


def use_kernels(module: torch.nn.Module) -> torch.nn.Module:
    """The same module: its quantized layers and attentions compute by the compiled kernels on the CPU from now on.

    Call it when the weights are loaded. Raises Misuse where there is no compiled library.
    """
    for part in module.modules():
        if isinstance(part, QuantLinear | QuantAttention):
            part.use_kernels()
    return module
