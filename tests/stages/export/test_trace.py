"""Tracing: an axis that cannot be dynamic is an error, never a static graph in silence."""

import pytest

from dit2deploy.base.errors import Failed
from dit2deploy.models.dit import DIT
from dit2deploy.models.family import Axis
from dit2deploy.stages.export.trace import trace
from tests.packing import tiny_module


def test_a_size_that_the_model_bakes_in_is_an_error():
    module = tiny_module(DIT)
    axes = {"hidden_states": {2: Axis("height", 2), 3: Axis("width", 2)}}
    with pytest.raises(Failed, match="cannot be dynamic"):
        trace(module, DIT, DIT.inputs(module.config, batch=2, seed=0), axes)
