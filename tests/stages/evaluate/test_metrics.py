"""Adapters over the metric packages, with stand-in weights of the real architectures: the packages' own values, and a
reason with a cure where something is missing. What takes lpips or torch-fidelity runs where they are installed."""

import hashlib
import importlib

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dit2deploy.base.errors import Misuse
from dit2deploy.stages.evaluate.metrics import METRICS, clip_score, fid, perceptual
from dit2deploy.stages.evaluate.metrics.pairs import Pairs, hub_file
from tests.pipelines import TOKENS, clip, tokenizer

PROMPTS = ("a cat", "a red dog", "red and dog")


@pytest.fixture
def pairs(tmp_path) -> Pairs:
    generator = np.random.default_rng(0)
    full = generator.random((3, 64, 64, 3), np.float32)
    engine = full + 0.05 * generator.standard_normal(full.shape).astype(np.float32)
    return Pairs.of({"engine": engine, "full_precision": full}, PROMPTS, samples=tmp_path / "samples")


def changed(pairs: Pairs, **fields) -> Pairs:
    return Pairs(**{**vars(pairs), **fields})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """put(state dict, its published name without the hash) -> the address of a stand-in in torch.hub's folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)

    def put(tensors: dict[str, torch.Tensor], name: str) -> str:
        torch.save(tensors, folder / "file")
        digest = hashlib.sha256((folder / "file").read_bytes()).hexdigest()
        (folder / "file").rename(folder / f"{name}-{digest[:8]}.pth")
        return f"https://nowhere/{name}-{digest[:8]}.pth"

    return put


def importable(name: str):
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def test_frames_of_a_video_are_images_of_its_prompt(tmp_path):
    videos = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.float32).reshape(2, 3, 4, 4, 3)
    made = Pairs.of({"engine": videos, "full_precision": videos}, ["a", "b"], samples=tmp_path)
    assert made.engine.shape == (6, 3, 4, 4) and made.prompts == ("a", "a", "a", "b", "b", "b")
    np.testing.assert_array_equal(made.engine[4].numpy(), videos[1, 1].transpose(2, 0, 1))


def test_psnr_of_the_pair_and_the_worst_of_them(pairs):
    found = METRICS[0].measure(pairs)
    apart = (pairs.engine - pairs.full_precision).double().pow(2).mean((1, 2, 3))
    np.testing.assert_allclose(
        [found["pair"], found["worst"]], [(-10 * apart.log10()).mean(), -10 * apart.log10().max()]
    )
    assert METRICS[0].measure(changed(pairs, engine=pairs.full_precision))["pair"] == 100


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    text = {**clip().config.to_dict(), "max_position_embeddings": TOKENS}
    torch.manual_seed(1)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config)
    model.visual_projection.weight.data.neg_()  # of these weights, all cosines are negative
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(images, tokenizer()).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_image_and_prompt(pairs, clip_folder):
    pairs = changed(pairs, clip=clip_folder)
    found = clip_score.measure(pairs)
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    processor = transformers.CLIPProcessor.from_pretrained(clip_folder)
    cosines = []
    for image, prompt in zip(pairs.engine, PROMPTS, strict=True):
        picture = Image.fromarray(np.rint(image.clamp(0, 1).numpy().transpose(1, 2, 0) * 255).astype(np.uint8))
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
        with torch.no_grad():
            cosines.append(model(**inputs).logits_per_image.item() / model.logit_scale.exp().item())
    assert found["engine"] == pytest.approx(100 * np.maximum(cosines, 0).mean(), abs=1e-3)
    assert 0 < min(cosines) < max(cosines) and found["engine"] != found["full_precision"]


def test_clip_without_weights_says_how_to_get_them(pairs, tmp_path, monkeypatch):
    with pytest.raises(Misuse, match="no CLIP model is on this disk") as caught:
        clip_score.measure(changed(pairs, clip=tmp_path))
    assert "hf download openai/clip-vit-base-patch16" in caught.value.cure


@pytest.mark.parametrize("measure, name", [(perceptual.measure, "lpips"), (fid.measure, "torch-fidelity")])
def test_a_missing_package_is_named(measure, name, pairs, tmp_path, monkeypatch):
    for index in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    for module in ("lpips", "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(Misuse, match="cannot be imported") as caught:
        measure(changed(pairs, real=tmp_path))
    assert f"pip install {name}" in caught.value.cure


def test_fid_without_real_images_or_with_too_few(pairs, tmp_path):
    with pytest.raises(Misuse, match="no folder of real images"):
        fid.measure(pairs)
    with pytest.raises(Misuse, match="too few"):
        fid.measure(changed(pairs, real=tmp_path))


def test_weights_must_be_there_and_the_published_ones(hub):
    url = hub({"x": torch.zeros(2)}, "net")
    path = hub_file(url)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(Misuse, match="its hash is another"):
        hub_file(url)
    path.unlink()
    with pytest.raises(Misuse, match="no such file") as caught:
        hub_file(url)
    assert f"Download {url}" in caught.value.cure


def test_lpips_is_what_the_package_gives(pairs, hub, monkeypatch):
    models, lpips = importable("torchvision.models"), importable("lpips")
    weights = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    torch.manual_seed(0)
    trunk = models.squeezenet1_1()
    previous = weights.value.url
    object.__setattr__(weights.value, "url", hub(trunk.state_dict(), "squeezenet1_1"))
    try:
        found = perceptual.measure(pairs, trunk="squeeze")
        equal = perceptual.measure(changed(pairs, engine=pairs.full_precision), trunk="squeeze")
    finally:
        object.__setattr__(weights.value, "url", previous)
    network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    state = {name: trunk.state_dict()[f"features.{name.partition('.')[2]}"] for name in network.net.state_dict()}
    network.net.load_state_dict(state)
    with torch.no_grad():
        want = network(2 * pairs.engine - 1, 2 * pairs.full_precision - 1).flatten()
    assert found["pair"] == pytest.approx(want.mean().item(), rel=1e-5) and found["pair"] > 0
    assert found["worst"] == pytest.approx(want.max().item(), rel=1e-5)
    assert equal["pair"] == pytest.approx(0, abs=1e-7)


def test_fid_is_small_to_the_same_images_and_larger_to_others(pairs, hub, tmp_path, monkeypatch):
    module = importable("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        random = module.FeatureExtractorInceptionV3("inception", ["2048"])
    for parameter in random.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    monkeypatch.setattr(module, "URL_INCEPTION_V3", hub(random.state_dict(), "weights-inception-2015-12-05"))
    real = tmp_path / "real"
    real.mkdir()
    for index, image in enumerate(pairs.full_precision):
        pixels = np.rint(image.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(real / f"{index}.png")
    found = fid.measure(changed(pairs, real=real))
    assert found["real"] == found["drawn"] == 3
    assert found["engine"] > 1e-3 and found["full_precision"] < 1e-3 * found["engine"]
