"""Z-Image's forward in tensors against diffusers' own, which takes lists and rotates by complex numbers."""

from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

from dit2deploy.artefacts.onnx_model import PortRecord
from dit2deploy.base.errors import Misuse
from dit2deploy.models.z_image import Z_IMAGE
from dit2deploy.nn.call import call_numpy
from dit2deploy.nn.engine_transformer import EngineTransformer
from tests.packing import tiny_module


@pytest.fixture(scope="module")
def modules():
    """diffusers' own module, and ours with the same weights."""
    ours = tiny_module(Z_IMAGE)
    own = diffusers.ZImageTransformer2DModel(**Z_IMAGE.tiny).eval()
    own.load_state_dict(ours.state_dict())
    return own, ours


@pytest.mark.parametrize("lengths", [(64, 64), (32,), (7, 33, 96), (1, 40)], ids=str)
def test_tensors_give_what_diffusers_lists_give(modules, lengths):
    own, ours = modules
    generator = torch.Generator().manual_seed(1)
    call = {
        "x": [torch.randn(4, 1, 48, 16, generator=generator) for _ in lengths],
        "t": torch.linspace(0.1, 0.9, len(lengths)),
        "cap_feats": [torch.randn(length, 32, generator=generator) for length in lengths],
        "patch_size": 2,
    }
    with torch.no_grad():
        want = own(**call, return_dict=False)[0]
        tensors = Z_IMAGE.arguments(dict(call))
        assert tensors.pop("patch_size") == 2 and set(tensors) == set(Z_IMAGE.axes(ours.config))
        got = Z_IMAGE.result(ours(**tensors, return_dict=False)[0])
    assert len(got) == len(want) == len(lengths)
    for expected, found in zip(want, got, strict=True):
        assert expected.std() > 0.1
        assert (expected - found).abs().max() < 2e-4  # t and 1000 - 1000 t are not the same to the last bit


def test_what_lies_beyond_a_text_is_not_read(modules):
    _, ours = modules
    inputs = Z_IMAGE.inputs(ours.config, batch=2, seed=0) | {"text_lengths": torch.tensor([5, 40])}
    changed = inputs["encoder_hidden_states"].clone()
    changed[0, 5:], changed[1, 40:] = 9.0, -9.0
    with torch.no_grad():
        want, got = (
            ours(**{**inputs, "encoder_hidden_states": text})[0]
            for text in (inputs.pop("encoder_hidden_states"), changed)
        )
    assert torch.equal(want, got)


def test_sizes_that_diffusers_would_pad_are_refused():
    call = {"x": [torch.zeros(4, 1, 16, 12)], "t": torch.zeros(1), "cap_feats": [torch.zeros(3, 32)], "patch_size": 2}
    with pytest.raises(Misuse, match="no multiple of 32 patches"):
        Z_IMAGE.arguments(call)


def test_an_engine_takes_and_gives_the_pipelines_lists(modules):
    """The engine's face, our module in the engine's place, called as ZImagePipeline calls the transformer."""
    own, ours = modules
    call = {"x": [torch.randn(4, 1, 16, 16)] * 2, "t": torch.full((2,), 0.25), "cap_feats": [torch.randn(5, 32)] * 2}
    kinds = {"text_lengths": "int64"}
    ports = [PortRecord(name=name, dtype=kinds.get(name, "float32"), shape=()) for name in Z_IMAGE.axes(ours.config)]
    manifest = SimpleNamespace(inputs=ports, outputs=[PortRecord(name="sample", dtype="float32", shape=())])
    config = {**Z_IMAGE.tiny, "_class_name": Z_IMAGE.class_name}
    bundle = SimpleNamespace(config=config, folder=Path(), manifest=manifest)
    engine = SimpleNamespace(run=lambda inputs: {"sample": call_numpy(ours, inputs)})
    transformer = EngineTransformer(bundle, engine)
    got = transformer(call["x"], call["t"], call["cap_feats"], joint_attention_kwargs=None, return_dict=False)[0]
    with torch.no_grad():
        want = own(**call, return_dict=False)[0]
    assert isinstance(got, list) and (torch.stack(got) - torch.stack(want)).abs().max() < 2e-4
