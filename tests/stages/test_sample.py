"""Images by an engine: seeds hold whatever is drawn beside them, and what cannot be drawn says what to do."""

import numpy as np
import pytest
from PIL import Image

from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate.images import grid, pixels, png
from dit2deploy.stages.sample import sample
from tests.stages.tiny_bundle import INPUTS, SIZE, tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("sample"))


def _sample(bundle, out, **options):
    return sample(bundle.folder, out, target="reference", **{"steps": 3, **options})


def test_the_picture_has_a_row_a_label(bundle, tmp_path):
    images = _sample(bundle, tmp_path / "out.png", labels=[7, 3, 7])
    assert images.shape == (3, 1, SIZE, SIZE)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1
    width, height = Image.open(tmp_path / "out.png").size
    assert height == 2 * (64 + 4) + 4
    assert width == 40 + 2 * (64 + 4) + 4


def test_an_image_depends_on_its_seed_alone(bundle, tmp_path):
    both = _sample(bundle, tmp_path / "a.png", labels=[1, 2], seed=5)
    alone = _sample(bundle, tmp_path / "b.png", labels=[2], seed=6)
    assert np.array_equal(both[1], alone[0])
    assert not np.array_equal(both[0], _sample(bundle, tmp_path / "c.png", labels=[1], seed=6)[0])


def test_guidance_reaches_the_engine(bundle, tmp_path):
    guided = _sample(bundle, tmp_path / "a.png", labels=[1], guidance=4.0)
    assert not np.array_equal(guided, _sample(bundle, tmp_path / "b.png", labels=[1], guidance=1.0))


@pytest.mark.parametrize(("labels", "message"), [([], "no label"), ([10], "label 10: the model knows 0..9")])
def test_labels_that_do_not_exist_are_refused(bundle, tmp_path, labels, message):
    with pytest.raises(Misuse, match=message):
        _sample(bundle, tmp_path / "out.png", labels=labels)
    assert not list(tmp_path.iterdir())


def test_a_latent_model_is_sent_to_its_pipeline(tmp_path):
    config = {"in_channels": 4, "sample_size": 32, "num_embeds_ada_norm": 1000}
    latent = tiny_bundle(tmp_path, config=config)
    with pytest.raises(Misuse, match="VAE") as raised:
        _sample(latent, tmp_path / "out.png", labels=[1])
    assert "dit2deploy.load" in raised.value.cure


def test_a_text_model_is_sent_to_its_pipeline(tmp_path):
    text = tiny_bundle(tmp_path, inputs=(*INPUTS[:2], INPUTS[2].model_copy(update={"name": "encoder_hidden_states"})))
    with pytest.raises(Misuse, match="class label"):
        _sample(text, tmp_path / "out.png", labels=[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels(tmp_path, channels):
    images = np.random.default_rng(0).uniform(-1, 1, (2, channels, 64, 64)).astype(np.float32)
    picture = grid([images])
    (tmp_path / "grid.png").write_bytes(png(picture))
    read = np.asarray(Image.open(tmp_path / "grid.png")).reshape(picture.shape)
    assert np.array_equal(read, picture)
    assert np.array_equal(read[4:68, 4:68], pixels(images)[0])
    assert pixels(np.array([-2.0, -1, 0, 1, np.nan]).reshape(1, 1, 1, 5)).ravel().tolist() == [0, 0, 128, 255, 0]
