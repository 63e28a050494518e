"""Transformers of diffusers that nobody described go through by assumptions, which are told, or are refused."""

import diffusers
import numpy as np
import onnxruntime
import pytest
import torch

from dit2deploy.base import progress
from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate.fidelity import sqnr_db
from dit2deploy.models import FAMILIES, family_of
from dit2deploy.models.load import linears_of
from dit2deploy.nn.convert import load_quantized
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.export import export
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.search import search

CONFIGS = {
    "SanaTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_cross_attention_heads": 3,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 48,
        "caption_channels": 32,
        "sample_size": 8,
    },
    "AuraFlowTransformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 32,
        "caption_projection_dim": 48,
        "pos_embed_max_size": 16,
    },
}
LUMINA = {
    "sample_size": 8,
    "in_channels": 4,
    "hidden_size": 48,
    "num_layers": 1,
    "num_attention_heads": 3,
    "num_kv_heads": 3,
    "multiple_of": 16,
    "cross_attention_dim": 32,
}


def saved(class_name: str, config: dict, out):
    torch.manual_seed(0)
    module = getattr(diffusers, class_name)(**config).eval()
    module.save_pretrained(out)
    return module


@pytest.mark.parametrize("class_name", CONFIGS)
def test_an_undescribed_transformer_goes_from_calibration_to_onnx(class_name, tmp_path):
    """Two steps, round-to-nearest; the file is compared with PyTorch at another batch by plain ONNX Runtime."""
    saved(class_name, CONFIGS[class_name], tmp_path / "model")
    notes: list[str] = []
    stop = progress.listen(lambda what, done, total: notes.append(what) if total == 0 else None)
    try:
        calibration = calibrate(tmp_path / "model", tmp_path / "calibration", samples=2, steps=2)
        policy = search(tmp_path / "model", tmp_path / "policy.json", recipe="w4a4")
        checkpoint = quantize(tmp_path / "model", policy, calibration, tmp_path / "checkpoint")
        made = export(checkpoint.folder, tmp_path / "onnx")
    finally:
        stop()
    assert any("roles of its layers are guessed" in note for note in notes)
    assert any("inputs are assumed" in note for note in notes)
    assert made.manifest.family == "generic" and made.manifest.assumptions
    assert {port.name: port.shape[0] for port in made.manifest.inputs} == dict.fromkeys(
        ("hidden_states", "encoder_hidden_states", "timestep"), "batch"
    )
    module = load_quantized(checkpoint)
    inputs = family_of(class_name).inputs(module.config, batch=3, seed=5)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(made.path), options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        want = module(**inputs, return_dict=False)[0].numpy()
    assert np.isfinite(want).all() and sqnr_db(want, got) > 25


def test_a_forward_that_asks_for_more_is_one_clear_error(tmp_path):
    saved("LuminaNextDiT2DModel", LUMINA, tmp_path / "model")
    with pytest.raises(Misuse, match="no described family, and its forward also asks for .*image_rotary_emb") as error:
        calibrate(tmp_path / "model", tmp_path / "calibration", samples=1, steps=1)
    assert "dit2deploy/models" in error.value.cure
    assert not (tmp_path / "calibration").exists()


def test_a_config_that_tells_no_size_is_one_clear_error():
    family = family_of("SanaTransformer2DModel")
    with pytest.raises(Misuse, match="tells no sample_size"):
        family.inputs({"in_channels": 4, "caption_channels": 32}, batch=1, seed=0)


@pytest.mark.parametrize("class_name", CONFIGS)
def test_roles_are_guessed_from_names(class_name):
    with torch.device("meta"):
        layers = linears_of(getattr(diffusers, class_name)(**CONFIGS[class_name]))
    roles = {name: family_of(class_name).role(name) for name in layers}
    assert {"block", "final"} <= set(roles.values()), roles


def test_what_is_no_transformer_of_diffusers_has_no_family():
    assert [family_of(family.class_name) for family in FAMILIES] == list(FAMILIES)
    for name in ("os", "system", "UNet2DConditionModel", "AutoencoderKL", "DiTPipeline", "models", "X.Y", ""):
        assert family_of(name) is None, name
