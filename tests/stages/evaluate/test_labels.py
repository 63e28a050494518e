"""Quality of an engine's images: as many as asked, fewer where time runs out, and never without the reason."""

import json

import numpy as np
import pytest

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import write_tensors
from dit2deploy.stages.evaluate import evaluate, summary
from tests.stages.tiny_bundle import tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier of the right shape with random weights."""
    generator = np.random.default_rng(0)
    shapes = {
        "conv1.weight": (4, 1, 3, 3),
        "conv1.bias": (4,),
        "conv2.weight": (6, 4, 3, 3),
        "conv2.bias": (6,),
        "features.weight": (8, 6 * 4 * 4),
        "features.bias": (8,),
        "logits.weight": (10, 8),
        "logits.bias": (10,),
        "real.mean": (8,),
    }
    tensors = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["real.mean"] = tensors["real.mean"].astype(np.float64)
    tensors["real.covariance"] = np.eye(8)
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    write_tensors(path, tensors)
    return path


def test_quality_is_written(bundle, classifier):
    result = evaluate(bundle.folder, classifier=classifier, samples=60, steps=2, target="reference")
    assert result["samples"] == 60
    assert 0 <= result["engine"]["class_accuracy"] <= 1
    assert result["engine"]["frechet_distance"] > 0
    assert "reason" in result["full_precision"]
    assert json.loads((bundle.folder / "quality.json").read_text())["engine"] == result["engine"]
    assert "not measured" in summary(result)


def test_the_same_seed_gives_the_same_quality(bundle, classifier):
    first, second = (
        evaluate(bundle.folder, classifier=classifier, samples=10, steps=2, target="reference", seed=3)["engine"]
        for _ in range(2)
    )
    assert first["frechet_distance"] == second["frechet_distance"]


def test_as_many_are_drawn_as_were_asked_for(bundle, classifier):
    """More than one batch, the last one not full."""
    result = evaluate(bundle.folder, classifier=classifier, samples=53, steps=1, target="reference")
    assert result["samples"] == 53
    assert 0 <= result["engine"]["class_accuracy"] <= 1 and result["engine"]["class_accuracy"] * 53 % 1 < 1e-9


def test_too_few_samples_are_refused(bundle, classifier):
    with pytest.raises(Misuse, match="too few"):
        evaluate(bundle.folder, classifier=classifier, samples=1, target="reference")
