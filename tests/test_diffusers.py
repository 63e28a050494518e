"""from_pretrained and save_pretrained of quantized folders, alone, sharded, in a pipeline; what is refused, and how."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers.quantizers import PipelineQuantizationConfig

from dit2deploy.artefacts.checkpoint import CONFIG, TENSORS
from dit2deploy.base.errors import Misuse
from dit2deploy.diffusers import Dit2DeployConfig
from dit2deploy.models.dit import DIT
from dit2deploy.nn import kernels
from dit2deploy.nn.convert import load_quantized, quantized_linears
from tests.packing import pack_checkpoint, policy_of, tiny_module, with_equal_embedders


def calls(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    size = model.config.sample_size
    with torch.inference_mode():
        return model(
            hidden_states=torch.randn(2, model.config.in_channels, size, size),
            timestep=torch.tensor([3, 700]),
            class_labels=torch.tensor([1, 2]),
        ).sample


@pytest.fixture
def loaded(tiny_checkpoint):
    return diffusers.DiTTransformer2DModel.from_pretrained(tiny_checkpoint.folder)


def test_a_quantized_folder_loads_and_computes_by_the_kernels(tiny_checkpoint, loaded, monkeypatch):
    reference = load_quantized(tiny_checkpoint)
    seen = []
    compute = kernels.compute
    monkeypatch.setattr(
        kernels,
        "compute",
        lambda op, *inputs, **attributes: seen.append(op.name) or compute(op, *inputs, **attributes),
    )
    torch.testing.assert_close(calls(loaded), calls(reference), rtol=1e-4, atol=1e-5)
    assert seen.count("HadamardQuantize") >= len(quantized_linears(reference))
    want = reference.state_dict()
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == {
        name: value.dtype for name, value in want.items()
    }
    assert all(torch.equal(value, want[name]) for name, value in loaded.state_dict().items())


def test_another_dtype_leaves_the_arithmetic_as_it_is(tiny_checkpoint, loaded):
    half = diffusers.DiTTransformer2DModel.from_pretrained(tiny_checkpoint.folder, torch_dtype=torch.float16)
    assert torch.equal(calls(half), calls(loaded))


@pytest.mark.parametrize("shard", ("10GB", "20KB"))
def test_saving_and_loading_comes_back_to_the_same(loaded, tmp_path, shard):
    loaded.save_pretrained(tmp_path / "again", max_shard_size=shard)
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(calls(again), calls(loaded))


def test_equal_tensors_come_back_under_every_name(tmp_path):
    """Stored once by dit2deploy; save_pretrained of what was loaded stores all, and loads again."""
    module = with_equal_embedders(tiny_module(DIT))
    checkpoint = pack_checkpoint(tmp_path / "checkpoint", module, policy_of(DIT, module))
    assert len(checkpoint.tensors.stored_as) == 3
    want = load_quantized(checkpoint).state_dict()
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(checkpoint.folder)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "again")
    for model in (loaded, again):
        assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    table = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    assert table in checkpoint.tensors.stored_as
    loaded.get_parameter(table).data.zero_()
    assert loaded.get_parameter(table.replace("blocks.1", "blocks.0")).any()


def pipeline_folder(tiny_dit_folder, tiny_checkpoint, out):
    """A pipeline as diffusers saves it, its transformer quantized."""
    shutil.copytree(tiny_dit_folder, out, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(tiny_checkpoint.folder, out / "transformer", ignore=shutil.ignore_patterns("scheduler"))
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(4,), norm_num_groups=2
    )
    vae.save_pretrained(out / "vae")
    index = json.loads((out / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]}))
    return out


@pytest.mark.parametrize("given", (False, True), ids=("plain", "PipelineQuantizationConfig"))
def test_a_pipeline_loads_its_quantized_transformer(tiny_dit_folder, tiny_checkpoint, loaded, tmp_path, given):
    folder = pipeline_folder(tiny_dit_folder, tiny_checkpoint, tmp_path / "pipeline")
    mapping = {"transformer": Dit2DeployConfig(tiny_checkpoint.policy)}
    options = {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)} if given else {}
    pipe = diffusers.DiTPipeline.from_pretrained(folder, **options)
    assert torch.equal(calls(pipe.transformer), calls(loaded))
    pipe.set_progress_bar_config(disable=True)
    # Without guidance: DiTPipeline takes class 1000 for the null class, which this model lacks.
    image = pipe(class_labels=[1], guidance_scale=1.0, num_inference_steps=2, output_type="np")
    assert image.images.shape[0] == 1


def test_a_full_precision_folder_is_refused(tiny_dit_folder, tiny_policy):
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        diffusers.DiTTransformer2DModel.from_pretrained(
            tiny_dit_folder / "transformer", quantization_config=Dit2DeployConfig(tiny_policy)
        )


def changed(tiny_checkpoint, out, change):
    shutil.copytree(tiny_checkpoint.folder, out)
    config = json.loads((out / CONFIG).read_text())
    change(config["quantization_config"]["policy"])
    (out / CONFIG).write_text(json.dumps(config))
    return out


def test_a_policy_of_another_model_is_refused(tiny_checkpoint, tmp_path):
    folder = changed(tiny_checkpoint, tmp_path / "other", lambda policy: policy["layers"].popitem())
    with pytest.raises(Misuse, match="says nothing of layer"):
        diffusers.DiTTransformer2DModel.from_pretrained(folder)


def test_a_newer_policy_is_refused(tiny_checkpoint, tmp_path):
    folder = changed(tiny_checkpoint, tmp_path / "newer", lambda policy: policy.update(schema_version=2))
    with pytest.raises(ValueError, match="schema_version"):
        diffusers.DiTTransformer2DModel.from_pretrained(folder)


def test_weights_of_another_policy_are_refused(tiny_checkpoint, tmp_path):
    def wider(policy):
        for layer in policy["layers"].values():
            if layer["weight"] == "ternary":
                layer["weight"] = "int4"

    folder = changed(tiny_checkpoint, tmp_path / "wider", wider)
    assert (folder / TENSORS).exists()
    with pytest.raises(ValueError, match="do not belong together"):
        diffusers.DiTTransformer2DModel.from_pretrained(folder)
