"""Opening models: what diffusers saves loads as it does there, and everything else is one clear Misuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit2deploy.base.errors import Misuse
from dit2deploy.models.dit import DIT
from dit2deploy.models.load import linears, linears_of, load_transformer, open_model
from tests.packing import tiny_module

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_dit_folder: Path, tmp_path: Path) -> Path:
    """A transformer folder of one's own, to be damaged."""
    shutil.copytree(tiny_dit_folder / "transformer", tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def shard(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def outputs(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(**DIT.inputs(module.config, batch=2, seed=0)).sample


def test_a_pipeline_and_its_transformer_load_as_diffusers_loads_them(tiny_dit_folder):
    want = outputs(tiny_module(DIT))
    for path in (tiny_dit_folder, tiny_dit_folder / "transformer"):
        module, family = load_transformer(path)
        assert family is DIT
        assert not module.training
        assert torch.equal(outputs(module), want)
        assert open_model(path).scheduler_config["prediction_type"] == "v_prediction"


def test_shards_are_one_model(folder):
    want = outputs(load_transformer(folder)[0])
    shard(folder)
    model = open_model(folder)
    assert len(model.tensors.files) == 2
    assert torch.equal(outputs(load_transformer(folder)[0]), want)
    assert model.sha256 == open_model(folder).sha256


def test_bfloat16_becomes_its_float32_value(folder):
    rewrite(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    module, _ = load_transformer(folder)
    want = tiny_module(DIT).proj_out_1.weight.bfloat16().float()
    assert module.proj_out_1.weight.dtype == torch.float32
    assert torch.equal(module.proj_out_1.weight, want)


def test_linears_come_without_weights(tiny_dit_folder):
    model = open_model(tiny_dit_folder)
    assert linears(model) == linears_of(tiny_module(DIT))
    assert linears(model)["transformer_blocks.1.ff.net.0.proj"] == (192, 48)


def test_the_hash_follows_the_weights(folder):
    before = open_model(folder).sha256
    rewrite(folder, lambda tensors: tensors["proj_out_2.bias"].add_(1))
    assert open_model(folder).sha256 != before


def test_tables_that_older_versions_saved_are_left_out(folder):
    rewrite(folder, lambda tensors: tensors.update({"pos_embed.pos_embed": torch.zeros(1, 16, 48)}))
    assert torch.equal(outputs(load_transformer(folder)[0]), outputs(tiny_module(DIT)))


def set_config(**values):
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


def truncate(folder: Path) -> None:
    with open(folder / WEIGHTS, "r+b") as file:
        file.truncate(5000)


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def lead_out(folder: Path) -> None:
    index = {"weight_map": {"x": "../../secret.safetensors"}}
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def lose_shard(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()


def shard_of_another_model(folder: Path) -> None:
    """One that the index names, with the names of other layers."""
    shard(folder)
    tensors = load_file(folder / "b.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, folder / "b.safetensors")


def shard_of_a_wider_model(folder: Path) -> None:
    """One with the same names and other shapes."""
    shard(folder)
    tensors = load_file(folder / "b.safetensors")
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}, folder / "b.safetensors")


def index_names_unknown(folder: Path) -> None:
    """A tensor that no shard holds."""
    shard(folder)
    path = folder / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["blocks.7.unknown"] = "a.safetensors"
    path.write_text(json.dumps(index))


def index_names_more(folder: Path) -> None:
    """A tensor that a shard holds and the model has no place for."""
    rewrite(folder, lambda tensors: tensors.update({"blocks.7.more": torch.zeros(2)}))
    shard(folder)


def unsupported_dtype(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"proj_out_2.bias": torch.zeros(4).to(torch.float8_e8m0fnu)}))


def whole_numbers(folder: Path) -> None:
    """As other quantizers store weights."""
    rewrite(folder, lambda tensors: tensors.update({"proj_out_2.bias": tensors["proj_out_2.bias"].to(torch.int8)}))


DAMAGES = {
    "no such folder": lambda folder: shutil.rmtree(folder),
    "config.json: no such file": lambda folder: (folder / "config.json").unlink(),
    "is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "names no class": lambda folder: (folder / "config.json").write_text("[]"),
    "unknown architecture": set_config(_class_name="UNet2DConditionModel"),
    "'system' is an unknown architecture": set_config(_class_name="system"),
    "does not describe": set_config(norm_type="layer_norm"),
    "asks for [": set_config(num_attention_heads=4),
    "which the config asks for": set_config(num_layers=3),
    "which the config does not know": set_config(num_layers=1),
    "has no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "truncated": truncate,
    "pickle": pickle_only,
    "leads out of the folder": lead_out,
    "b.safetensors: no such file": lose_shard,
    "b.safetensors: lacks the tensor": shard_of_another_model,
    ", the config asks for": shard_of_a_wider_model,
    "lacks the tensor 'blocks.7.unknown'": index_names_unknown,
    "blocks.7.more, which the config does not know": index_names_more,
    "proj_out_2.bias holds I8, not floating-point weights": whole_numbers,
    "unknown dtype": unsupported_dtype,
    "lack proj_out_2.bias": lambda folder: rewrite(folder, lambda tensors: tensors.pop("proj_out_2.bias")),
    "quantized checkpoint": lambda folder: (folder / "quantization_config.json").write_text("{}"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_what_is_broken_is_one_clear_error(message, folder):
    DAMAGES[message](folder)
    with pytest.raises(Misuse) as error:
        load_transformer(folder)
    assert message in error.value.cause
    assert error.value.cure


def test_a_pipeline_without_a_transformer_says_so(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(Misuse, match="no transformer"):
        open_model(tmp_path)


def test_reading_copies_one_tensor(folder):
    model = open_model(folder)
    value = model.tensors.read("proj_out_2.bias")
    value += 1
    assert not np.array_equal(value, model.tensors.read("proj_out_2.bias"))


def test_two_experts_take_a_policy_each(tiny_dit_folder, tmp_path):
    """A pipeline with transformer_2 (Wan2.2) is refused as a whole; each expert opens by its own folder."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tiny_dit_folder, pipeline)
    shutil.copytree(pipeline / "transformer", pipeline / "transformer_2")
    with pytest.raises(Misuse, match="two experts, transformer and transformer_2") as error:
        open_model(pipeline)
    for name in ("transformer", "transformer_2"):
        assert str(pipeline / name) in error.value.cure
        assert open_model(pipeline / name).scheduler_config is not None


def test_a_pipeline_whose_transformer_is_gone_says_so(tiny_dit_folder, tmp_path):
    """The index names it, the folder is not there."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tiny_dit_folder, pipeline, ignore=shutil.ignore_patterns("transformer"))
    with pytest.raises(Misuse, match="no transformer"):
        open_model(pipeline)
