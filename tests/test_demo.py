"""The ternary checkpoint that comes with the package is of its model, small, trained, and answers much as the model."""

import torch

from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.demo import CHECKPOINT, PATH
from dit2deploy.evaluate import sqnr_db
from dit2deploy.models.load import load_transformer, open_model
from dit2deploy.nn.convert import load_quantized


def test_the_checkpoint_is_a_trained_ternary_one_of_the_model():
    checkpoint = Checkpoint.load(CHECKPOINT)
    source = open_model(PATH)
    assert checkpoint.manifest.model_sha256 == source.sha256 and checkpoint.manifest.training["steps"] > 500
    blocks = [layer for name, layer in checkpoint.policy.layers.items() if source.family.role(name) == "block"]
    assert {(layer.weight, layer.activation_bits) for layer in blocks} == {("ternary", (4,))}
    assert sum(checkpoint.tensors.read(name).nbytes for name in checkpoint.tensors) < 3e6


def test_it_answers_much_as_the_model_does():
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(3, 1, 16, 16, generator=generator),
        "timestep": torch.tensor([999, 700, 400]),
        "class_labels": torch.tensor([3, 8, 10]),
    }
    with torch.no_grad():
        exact = load_transformer(PATH)[0](**inputs, return_dict=False)[0]
        found = load_quantized(Checkpoint.load(CHECKPOINT))(**inputs, return_dict=False)[0]
    assert sqnr_db(exact.numpy(), found.numpy()) > 20
