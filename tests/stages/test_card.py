"""The model card says what was measured, shows samples, and is not written without evidence."""

import json
import re
import shutil

import pytest

from dit2deploy.artefacts.bundle import PARITY, PROFILE
from dit2deploy.base.errors import Misuse
from dit2deploy.stages.card import card


@pytest.fixture(scope="module")
def bundle(compiled, tmp_path_factory):
    """One of its own: cards are written into it."""
    return shutil.copytree(compiled, tmp_path_factory.mktemp("card") / "bundle")


def test_the_card_shows_the_evidence(bundle):
    text = card(bundle, base_model="someone/dit", licence="apache-2.0", steps=2).read_text()
    front = text.split("---")[1]
    assert "base_model: someone/dit" in front and "license: apache-2.0" in front and "- w1.58a4" in front
    assert json.loads((bundle / PARITY).read_text())["status"] in text
    engine = next(row for row in json.loads((bundle / PROFILE).read_text())["latency"] if row["name"] == "engine")
    assert re.search(r"latency of a step.*engine \| \d", text) and engine["label"] in text
    assert "Full precision above ort-cpu engine" in text
    assert (bundle / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_draws_the_same_picture(bundle):
    pictures = []
    for seed in (1, 1, 2):
        card(bundle, steps=2, seed=seed)
        pictures.append((bundle / "samples.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize("name", (PARITY, PROFILE))
def test_without_evidence_there_is_no_card(bundle, tmp_path, name):
    folder = shutil.copytree(bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("README.md", name))
    with pytest.raises(Misuse, match="was not measured") as error:
        card(folder, steps=2)
    assert "dit2deploy p" in error.value.cure
    assert not (folder / "README.md").exists()
