"""A LoRA ends up in the weights, whatever its file calls the factors; what is no LoRA of the model is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.base import files, progress
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_folder
from dit2deploy.models.load import load_transformer, open_model
from dit2deploy.pipeline import compile
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.fuse_lora import fuse_lora
from tests import pipelines

LAYER = "transformer_blocks.0.attn1.to_q"


def factors(folder, rank=3, layer=LAYER):
    n, k = open_model(folder).tensors.shape(f"{layer}.weight")
    random = np.random.default_rng(0)
    return random.standard_normal((rank, k), np.float32), random.standard_normal((n, rank), np.float32)


def written(path, tensors, metadata=None):
    files.write_tensors(path, tensors, metadata)
    return path


def weight(folder, layer=LAYER):
    return open_model(folder).tensors.read(f"{layer}.weight")


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    (
        ("transformer.", "lora_A.weight", "lora_B.weight"),
        ("base_model.model.", "lora_A.default.weight", "lora_B.default.weight"),
        ("", "lora_down.weight", "lora_up.weight"),
    ),
)
@pytest.mark.parametrize("alpha", ("none", "tensor"))
def test_the_weights_are_the_sum(tiny_dit_folder, tmp_path, prefix, down, up, alpha):
    a, b = factors(tiny_dit_folder)
    tensors = {f"{prefix}{LAYER}.{down}": a, f"{prefix}{LAYER}.{up}": b}
    if alpha == "tensor":
        tensors[f"{prefix}{LAYER}.alpha"] = np.array(6.0, np.float32)
    made = fuse_lora(tiny_dit_folder, written(tmp_path / "l.safetensors", tensors), tmp_path / "o", scale=0.5)
    strength = 0.5 * (1.0 if alpha == "none" else 2.0)
    np.testing.assert_allclose(weight(made.folder), weight(tiny_dit_folder) + strength * (b @ a), atol=1e-6)
    before, after = (load_transformer(folder)[0].state_dict() for folder in (tiny_dit_folder, tmp_path / "o"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"{LAYER}.weight"]
    assert made.scheduler_config == open_model(tiny_dit_folder).scheduler_config


# Sorted as diffusers writes them: a text encoder's keys come first.
TEXT = {"text_encoder.alpha_pattern": {"to_q": 96}, "text_encoder.lora_alpha": 48, "text_encoder.use_dora": True}
STRENGTHS = {  # of alpha and rank 3, beside those of a text encoder
    "text": ({}, 1.0),
    "own": ({"transformer.lora_alpha": 6}, 2.0),
    "pattern": ({"transformer.alpha_pattern": {"attn1.to_q": 12, "to_q": 3}, "transformer.lora_alpha": 6}, 4.0),
    "rslora": ({"transformer.alpha_pattern": {"o_q": 9}, "lora_alpha": 6, "transformer.use_rslora": True}, 6 / 3**0.5),
}


@pytest.mark.parametrize(("where", "name"), (*(("metadata", name) for name in STRENGTHS), ("beside", "pattern")))
def test_the_strength_is_what_the_configuration_says_of_the_transformer(tiny_dit_folder, tmp_path, name, where):
    told, strength = STRENGTHS[name]
    a, b = factors(tiny_dit_folder)
    tensors = {f"transformer.{LAYER}.lora_A.weight": a, f"transformer.{LAYER}.lora_B.weight": b}
    if where == "metadata":
        metadata = {"lora_adapter_metadata": json.dumps({**TEXT, **told})}
        path = written(tmp_path / "l.safetensors", tensors, metadata)
    else:  # PEFT: of one model, without prefixes
        path = written(tmp_path / "adapter_model.safetensors", tensors)
        own = {key.removeprefix("transformer."): value for key, value in told.items()}
        files.write_json(tmp_path / "adapter_config.json", own)
    made = fuse_lora(tiny_dit_folder, path, tmp_path / "o")
    np.testing.assert_allclose(weight(made.folder), weight(tiny_dit_folder) + strength * (b @ a), atol=1e-5)


@pytest.mark.parametrize("told", ({"transformer.use_dora": True}, {"alpha_pattern": {"(": 1}}, ["lora_alpha"]))
def test_a_configuration_that_is_not_served_is_refused(tiny_dit_folder, tmp_path, told):
    a, b = factors(tiny_dit_folder)
    tensors = {f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b}
    path = written(tmp_path / "l.safetensors", tensors, {"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(Misuse, match="metadata lora_adapter_metadata"):
        fuse_lora(tiny_dit_folder, path, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "match"),
    (
        (lambda a, b: {f"{LAYER}.lora_A.weight": a}, "lacks one of its two factors"),
        (lambda a, b: {f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b[:-1]}, "is not its weight's"),
        (lambda a, b: {"blocks.9.lora_A.weight": a, "blocks.9.lora_B.weight": b}, "belongs to no linear layer"),
        (lambda a, b: {f"{LAYER}.lora_magnitude_vector": a}, "DoRA"),
        (lambda a, b: {"text_encoder.x.lora_A.weight": a}, "holds no LoRA of a transformer"),
        (lambda a, b: {f"{LAYER}.lora_A.weight": a * np.nan, f"{LAYER}.lora_B.weight": b}, "NaN or inf"),
    ),
    ids=("half", "shape", "layer", "dora", "text", "nan"),
)
def test_what_is_no_lora_of_this_model_is_refused(tiny_dit_folder, tmp_path, change, match):
    path = written(tmp_path / "l.safetensors", change(*factors(tiny_dit_folder)))
    with pytest.raises(Misuse, match=match):
        fuse_lora(tiny_dit_folder, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("links", ("hard", "symbolic", "none"))
def test_a_whole_pipeline_stays_one(tmp_path, monkeypatch, links):
    """Its other components are there, however links can be made, and it draws prompts with the LoRA."""

    def refused(*_arguments):
        raise OSError("no links here")

    for call in {"hard": (), "symbolic": ("link",), "none": ("link", "symlink")}[links]:
        monkeypatch.setattr(f"os.{call}", refused)
    source = pipelines.flux(tmp_path / "flux")
    layer = "transformer_blocks.0.attn.to_q"
    a, b = factors(source, layer=layer)
    path = written(tmp_path / "l.safetensors", {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b})
    made = fuse_lora(source, path, tmp_path / "out", scale=0.5)
    out = tmp_path / "out"
    assert (out / "model_index.json").read_bytes() == (source / "model_index.json").read_bytes()
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler"):
        assert sha256_of_folder(out / name) == sha256_of_folder(source / name)
        kinds = {(file.is_symlink(), file.stat().st_nlink > 1) for file in (out / name).iterdir()}
        assert kinds == {{"hard": (False, True), "symbolic": (True, False), "none": (False, False)}[links]}
    np.testing.assert_allclose(weight(made.folder, layer), weight(source, layer) + 0.5 * (b @ a), atol=1e-6)
    if links == "symbolic":
        (tmp_path / "prompts.txt").write_text("a cat")
        settings = {"prompts": tmp_path / "prompts.txt", "steps": 2, "height": 8, "width": 8}
        first, fused = (calibrate(folder, tmp_path / f"{folder.name}.set", **settings) for folder in (source, out))
        np.testing.assert_array_equal(first.call(0)["hidden_states"], fused.call(0)["hidden_states"])
        assert not np.array_equal(first.call(1)["hidden_states"], fused.call(1)["hidden_states"])


def test_compile_adds_it_before_all_else(tiny_dit_folder, tmp_path):
    a, b = factors(tiny_dit_folder)
    lora = written(tmp_path / "l.safetensors", {f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b})
    options = {"lora": lora, "lora_scale": 0.5, "samples": 1, "steps": 2}
    notes = []

    def stop(what: str, done: int, total: int | None) -> None:
        notes.append(what)
        if what == "quantize" and done == 2:
            raise KeyboardInterrupt

    remove = progress.listen(stop)
    try:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                compile(tiny_dit_folder, tmp_path / "bundle", **options)
    finally:
        remove()
    work = tmp_path / "bundle.work"
    np.testing.assert_allclose(weight(work / "model"), weight(tiny_dit_folder) + 0.5 * (b @ a), atol=1e-6)
    recorded = CalibrationSet.load(work / "calibration").manifest
    assert recorded.model_sha256 == open_model(work / "model").sha256 != open_model(tiny_dit_folder).sha256
    assert notes.count("fuse-lora: done before, kept") == 1
    with pytest.raises(Misuse, match="no such file"):
        compile(tiny_dit_folder, tmp_path / "other", lora=tmp_path / "gone.safetensors")


def test_compile_fuses_anew_where_the_configuration_beside_the_lora_changed(tiny_dit_folder, tmp_path, monkeypatch):
    """PEFT keeps alpha beside the tensors, whose bytes stay the same."""

    def stop(*_arguments, **_options):
        raise Misuse("here the LoRA is fused.", "Look at it.")

    monkeypatch.setattr("dit2deploy.stages.calibrate.calibrate", stop)
    a, b = factors(tiny_dit_folder)
    path = written(tmp_path / "adapter_model.safetensors", {f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b})
    notes = []
    remove = progress.listen(lambda what, done, total: notes.append(what))
    try:
        for alpha, kept in ((3, 0), (6, 0), (6, 1)):
            files.write_json(tmp_path / "adapter_config.json", {"lora_alpha": alpha})
            with pytest.raises(Misuse, match="here the LoRA is fused"):
                compile(tiny_dit_folder, tmp_path / "bundle", lora=path)
            fused = weight(tmp_path / "bundle.work" / "model")
            np.testing.assert_allclose(fused, weight(tiny_dit_folder) + alpha / 3 * (b @ a), atol=1e-5)
            assert notes.count("fuse-lora: done before, kept") == kept
    finally:
        remove()


def test_a_lora_in_the_place_of_a_model_is_told(tiny_dit_folder, tmp_path):
    a, b = factors(tiny_dit_folder)
    tensors = {f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b}
    written(tmp_path / "lora" / "pytorch_lora_weights.safetensors", tensors)
    with pytest.raises(Misuse, match="holds a LoRA and no whole model") as caught:
        open_model(tmp_path / "lora")
    assert "fuse-lora" in caught.value.cure
    both = shutil.copytree(tiny_dit_folder / "transformer", tmp_path / "both")
    file = files.TensorFile(both / "diffusion_pytorch_model.safetensors")
    written(file.path, {**{name: file.read(name) for name in file}, **tensors})
    with pytest.raises(Misuse, match=r"lora_A\.weight is part of a LoRA"):
        load_transformer(both)


def test_a_quantized_folder_is_no_model(tiny_checkpoint, tmp_path):
    """As diffusers saves it: config.json alone says that it is quantized."""
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes((tiny_checkpoint.folder / name).read_bytes())
    with pytest.raises(Misuse, match="is quantized already"):
        open_model(tmp_path)
