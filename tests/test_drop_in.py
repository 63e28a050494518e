"""`dit2deploy.load` in the place of a diffusers transformer, in a real pipeline."""

import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

import dit2deploy
from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate.fidelity import sqnr_db
from dit2deploy.models.load import load_transformer
from dit2deploy.nn.convert import load_quantized
from dit2deploy.stages.build import build
from tests.bundles import SCHEDULER, engines, sources

TARGET = engines()[-1]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    bundle = build(sources().onnx, tmp_path_factory.mktemp("drop_in") / "bundle", targets=[TARGET])
    loaded = dit2deploy.load(bundle.folder, target=TARGET, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    return load_quantized(Checkpoint.load(sources().checkpoint))


def _call(batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "hidden_states": torch.randn(batch, 1, 8, 8, generator=generator),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch),
    }


def _pipeline(transformer) -> diffusers.DiTPipeline:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(latent_channels=1, block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    full, _ = load_transformer(sources().pipeline)
    pipe = diffusers.DiTPipeline(full, vae.eval(), diffusers.DDIMScheduler.from_config(SCHEDULER))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = transformer
    return pipe


def test_a_real_pipeline_gives_the_same_images(engine, original):
    images = []
    for transformer in (original, engine):
        made = _pipeline(transformer)(
            class_labels=[1, 7],
            guidance_scale=1.0,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
        )
        images.append(made.images)
    assert images[0].shape == (2, 8, 8, 3) and images[0].std() > 0.01
    assert sqnr_db(*images) > 25


def test_a_call_is_that_of_the_diffusers_class(engine, original):
    want = original(**_call()).sample
    got = engine(**_call())
    assert isinstance(got, Transformer2DModelOutput) and got.sample.dtype == torch.float32
    assert sqnr_db(want.numpy(), got.sample.numpy()) > 25
    (plain,) = engine(**_call(), return_dict=False)
    assert torch.equal(plain, got.sample)
    call = _call()
    by_position = engine(call["hidden_states"], call["timestep"], call["class_labels"])
    assert torch.equal(by_position.sample, got.sample)
    half = {**call, "hidden_states": call["hidden_states"].bfloat16(), "timestep": call["timestep"].float()}
    assert engine(**half).sample.dtype == torch.float32
    assert engine(**_call(3), cross_attention_kwargs={}).sample.shape == (3, 1, 8, 8)


def test_config_and_properties_are_those_of_the_class(engine, original):
    assert engine.config.sample_size == original.config.sample_size
    assert engine.config["in_channels"] == engine.config.in_channels == 1
    assert set(original.config) <= set(engine.config)
    assert engine.dtype == torch.float32 and engine.device == torch.device("cpu")
    assert engine.eval() is engine
    assert engine.to("cpu") is engine.to(torch.float32) is engine.to(device="cpu", dtype=torch.float32) is engine
    with engine.cache_context("cond"):
        pass


@pytest.mark.parametrize("wanted", ("cuda", torch.device("cuda:0"), torch.float16))
def test_what_it_cannot_become_is_said(engine, wanted):
    with pytest.raises(Misuse, match="cannot be moved to"):
        engine.to(wanted)


@pytest.mark.parametrize(
    ("change", "match"),
    (
        ({"class_labels": None}, "needs the argument class_labels"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
        ({"cross_attention_kwargs": {"scale": 1.0}}, "does not know the argument cross_attention_kwargs"),
        ({"hidden_states": torch.zeros(2, 1, 9, 9)}, "refused the inputs"),
        ({"timestep": torch.tensor([0.5, 1.5])}, "no integers"),
    ),
    ids=("missing", "unknown", "unused", "shape", "fraction"),
)
def test_wrong_arguments_are_refused(engine, change, match):
    with pytest.raises(Misuse, match=match):
        engine(**{**_call(), **change})


def test_the_package_imports_without_torch_and_names_what_is_public():
    code = (
        "import sys, dit2deploy; assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert {'load', 'Bundle', 'compile'} <= set(dir(dit2deploy)) and dit2deploy.__version__\n"
        "dit2deploy.Bundle; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        getattr(dit2deploy, "lo" + "od")


def test_targets_that_are_not_there_are_refused(engine):
    with pytest.raises(Misuse, match="has no engine for tensorrt"):
        dit2deploy.load(engine.bundle.folder, target="tensorrt")
