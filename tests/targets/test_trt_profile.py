"""Profiles of TensorRT engines: what their axes are built for, and what is said of inputs outside of it."""

import numpy as np
import pytest

from dit2deploy.artefacts.onnx_model import AxisRecord, PortRecord
from dit2deploy.base.errors import Misuse
from dit2deploy.models.family import Axis
from dit2deploy.targets.trt_profile import check_inputs, profile_of, ranges_of

PORTS = (
    PortRecord(name="hidden_states", dtype="float32", shape=("batch", 4, "height")),
    PortRecord(name="text", dtype="float32", shape=("batch", "tokens", 32)),
    PortRecord(name="ids", dtype="float32", shape=("tokens",)),
)
AXES = (
    AxisRecord(name="height", least=2, usual=8, most=12, multiple=2, bound=24),
    AxisRecord(name="tokens", least=1, usual=77, most=512),
)


@pytest.fixture
def model(sample):
    """The sample with the ports above, as far as its manifest goes."""
    manifest = sample.onnx.manifest.model_copy(update={"inputs": PORTS, "axes": AXES})
    return type(sample.onnx)(sample.onnx.folder, manifest)


def test_lengths_are_the_manifests_or_those_asked_for(model):
    profile = profile_of(model, {"tokens": (77, 77, 333), "height": (8, 8, 24)})
    assert ranges_of(profile, PORTS) == {
        "hidden_states": [(1, 2, 16), (8, 8, 24)],
        "text": [(1, 2, 16), (77, 77, 333)],
        "ids": [(77, 77, 333)],
    }
    assert profile_of(model, {})["height"] == AXES[0]


@pytest.mark.parametrize(
    "ranges, message",
    [
        ({"token": (1, 2, 3)}, r"no dynamic axis 'token' \(there: batch, height, tokens\)"),
        ({"tokens": (1, 3, 2)}, "range 1:3:2 of tokens is none"),
        ({"tokens": (0, 1, 2)}, "range 0:1:2 of tokens is none"),
        ({"tokens": (1, 2)}, "range 1:2 of tokens is none"),
        ({"height": (2, 7, 8)}, r"(?s)2:7:8 of height is none.*three multiples of 2"),
        ({"height": (2, 8, 26)}, "passes 24, the most that the model takes"),
    ],
)
def test_a_range_that_cannot_be_is_refused(model, ranges, message):
    with pytest.raises(Misuse, match=message):
        profile_of(model, ranges)


def test_an_axis_that_nobody_tells_of_asks_for_a_range(model):
    older = type(model)(model.folder, model.manifest.model_copy(update={"axes": ()}))
    with pytest.raises(Misuse, match=r"(?s)no lengths of the dynamic axis height.*--range height=") as caught:
        profile_of(older, {"tokens": (1, 1, 9)})
    assert caught.value.cure
    assert list(profile_of(older, {"tokens": (1, 1, 9), "height": (1, 1, 9)})) == ["batch", "height", "tokens"]


@pytest.mark.parametrize(
    "height, tokens, ids, message",
    [
        (14, 9, 9, r"(?s)height of hidden_states is 14; it is built for 2 to 12\..*--range height=2:8:14"),
        (7, 9, 9, "height of hidden_states is 7, no multiple of 2"),
        (8, 513, 513, r"(?s)tokens of text is 513.*--range tokens=1:77:513"),
        (8, 9, 10, "tokens is 9 in text and 10 in ids"),
    ],
)
def test_inputs_that_the_engine_was_not_built_for_are_told(model, height, tokens, ids, message):
    profile = profile_of(model, {})
    shapes = {"hidden_states": (2, 4, height), "text": (2, tokens, 32), "ids": (ids,)}
    with pytest.raises(Misuse, match="refused the inputs") as caught:
        check_inputs(profile, PORTS, {name: np.empty(shape, np.float32) for name, shape in shapes.items()})
    caught.match(message)
    fine = {"hidden_states": (2, 4, 8), "text": (2, 512, 32), "ids": (512,)}
    check_inputs(profile, PORTS, {name: np.empty(shape, np.float32) for name, shape in fine.items()})


def test_a_family_asks_for_whole_multiples_that_its_model_can_have():
    assert Axis("a", 16, usual=100, longest=200).record() == AxisRecord(
        name="a", least=16, usual=96, most=192, multiple=16
    )
    assert Axis("a", 2, 12, usual=128, longest=192).record() == AxisRecord(
        name="a", least=2, usual=24, most=24, multiple=2, bound=24
    )
