"""The digit reader computes its network, reads real digits, and its Fréchet distance has the closed form."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dit2deploy.base.errors import Misuse
from dit2deploy.demo import CLASSIFIER
from dit2deploy.evaluate import Classifier, frechet_distance
from dit2deploy.evaluate.quality import frechet_distance_of_moments, moments

READER = Classifier.load(CLASSIFIER)


@pytest.fixture(scope="module")
def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797 real digits in the middle of 16 x 16 pixels, as the tool draws them, and their labels."""
    for package in ("torch", "diffusers", "sklearn"):
        pytest.importorskip(package)
    tool = Path(__file__).parents[2] / "tools" / "pictures.py"
    spec = importlib.util.spec_from_file_location("pictures", tool)
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    images, labels = pictures.digits()
    return pictures.place(images, labels.new_zeros(len(labels), 2)).numpy(), labels.numpy()


def test_the_network_equals_its_torch_twin():
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(value) for name, value in READER.tensors.items()}
    images = np.random.default_rng(0).uniform(-1, 1, (300, 1, 16, 16)).astype(np.float32)
    x = torch.from_numpy(images)
    for layer in ("conv1", "conv2"):
        x = torch.nn.functional.conv2d(x, tensors[f"{layer}.weight"], tensors[f"{layer}.bias"], padding=1)
        x = torch.nn.functional.max_pool2d(x.relu(), 2)
    features = torch.nn.functional.linear(x.flatten(1), tensors["features.weight"], tensors["features.bias"])
    logits = torch.nn.functional.linear(features.relu(), tensors["logits.weight"], tensors["logits.bias"])
    np.testing.assert_allclose(READER.features(images), features.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(READER.logits(images), logits.numpy(), rtol=1e-4, atol=1e-4)


def test_real_digits_are_read_and_are_near_to_real_ones(real_digits):
    images, labels = real_digits
    assert READER.class_accuracy(images, labels) > 0.97
    assert READER.distance_to_real(images) < READER.distance_to_real(images[:, :, ::-1]) / 10


def test_wrong_labels_lower_accuracy_and_missing_classes_raise_the_distance(real_digits):
    images, labels = real_digits
    shuffled = np.random.default_rng(0).permutation(labels)
    assert READER.class_accuracy(images, shuffled) < 0.2
    assert READER.distance_to_real(images[labels != 3]) > 2 * READER.distance_to_real(images)


def test_distance_of_normals_has_the_closed_form():
    # One dimension, and axes that commute: (m_a - m_b)^2 + (s_a - s_b)^2 for each axis.
    mean_a, mean_b = np.array([0.0, 2.0, 1.0]), np.array([1.0, 2.0, -1.0])
    deviations_a, deviations_b = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.0])
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    got = frechet_distance_of_moments(
        turn @ mean_a,
        turn * deviations_a**2 @ turn.T,
        turn @ mean_b,
        turn * deviations_b**2 @ turn.T,
    )
    assert got == pytest.approx(5 + 4 + 0.25)


def test_distance_equals_the_general_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    random = np.random.default_rng(3)
    a, b = (
        random.standard_normal((200, 8)),
        random.standard_normal((150, 8)) @ random.standard_normal((8, 8)),
    )
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    root = linalg.sqrtm(cov_a @ cov_b).real
    want = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_distance_is_zero_to_itself_and_stable_with_few_samples():
    few = np.random.default_rng(4).standard_normal((20, 32))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, few + 1) == pytest.approx(32, rel=1e-6)


def test_misuse_is_told(tmp_path):
    with pytest.raises(Misuse, match="no such file"):
        Classifier.load(tmp_path / "absent.safetensors")
    with pytest.raises(Misuse, match="shape"):
        READER.logits(np.zeros((1, 16, 16), np.float32))
    with pytest.raises(Misuse, match="labels"):
        READER.class_accuracy(np.zeros((2, 1, 16, 16), np.float32), np.zeros(3, int))
    with pytest.raises(Misuse, match="two samples"):
        frechet_distance(np.zeros((1, 4)), np.zeros((9, 4)))
    assert READER.features(np.zeros((0, 1, 16, 16), np.float32)).shape == (0, 32)
