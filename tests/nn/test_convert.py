"""Checkpoints as PyTorch modules: what fits loads, what does not is one clear Misuse."""

import shutil

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from dit2deploy.artefacts.checkpoint import TENSORS, Checkpoint
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import write_tensors
from dit2deploy.models.dit import DIT
from dit2deploy.nn.convert import empty_quantized, load_quantized, quantized_linears
from tests.packing import tiny_module

LAYER = "transformer_blocks.0.attn1.to_q"


def test_it_is_called_as_the_diffusers_transformer_is(tiny_checkpoint):
    module = load_quantized(tiny_checkpoint)
    inputs = DIT.inputs(module.config, batch=2, seed=0)
    with torch.no_grad():
        y, full = module(**inputs).sample, tiny_module(DIT)(**inputs).sample
    assert 0.01 * full.std() < (y - full).std() < 0.5 * full.std()
    assert module.dtype == torch.float32
    assert {name for name, layer in tiny_checkpoint.policy.layers.items() if layer.is_quantized} == set(
        quantized_linears(module)
    )


def test_keys_are_those_of_the_checkpoint(tiny_checkpoint):
    assert set(load_quantized(tiny_checkpoint).state_dict()) == set(tiny_checkpoint.tensors)


def test_an_empty_model_takes_no_memory_for_weights(tiny_checkpoint):
    module = empty_quantized(tiny_checkpoint.config, tiny_checkpoint.policy)
    real = {name for name, value in module.state_dict().items() if not isinstance(value, FakeTensor)}
    assert real == {f"{name}.qmax" for name in quantized_linears(module)}
    assert not isinstance(module.pos_embed.pos_embed, FakeTensor)


CHANGES = {
    f"lacks the tensor {LAYER}.weight_scale": lambda tensors: tensors.pop(f"{LAYER}.weight_scale"),
    "holds stranger": lambda tensors: tensors.update(stranger=np.zeros(3, np.float32)),
    f"{LAYER}.bias is [3], not [48]": lambda tensors: tensors.update({f"{LAYER}.bias": np.zeros(3, np.float32)}),
    f"{LAYER}.weight has dtype F32": lambda tensors: tensors.update(
        {f"{LAYER}.weight": tensors[f"{LAYER}.weight"].astype(np.float32)}
    ),
    f"{LAYER}.qmax is not what": lambda tensors: tensors.update({f"{LAYER}.qmax": np.array([127.0], np.float32)}),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_checkpoint_that_does_not_fit_is_refused(message, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint.folder, tmp_path / "checkpoint")
    tensors = {name: tiny_checkpoint.tensors.read(name) for name in tiny_checkpoint.tensors}
    CHANGES[message](tensors)
    write_tensors(tmp_path / "checkpoint" / TENSORS, tensors)
    with pytest.raises(Misuse) as error:
        load_quantized(Checkpoint.load(tmp_path / "checkpoint"))
    assert message in error.value.cause
    assert error.value.cure


def test_a_policy_for_another_model_is_refused(tiny_checkpoint):
    config = {**tiny_checkpoint.config, "num_layers": 3}
    with pytest.raises(Misuse, match="says nothing of layer"):
        empty_quantized(config, tiny_checkpoint.policy)
