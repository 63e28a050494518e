"""Small graphs of tests that rewrite them: what is in them, and what they compute by the bodies of our ops."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from dit2deploy.stages.export.bodies import add_bodies


def count(model: ir.Model) -> Counter[str]:
    """Nodes by their op."""
    return Counter(node.op_type for node in model.graph)


def run(model: ir.Model, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs by onnx.reference, once the checker has passed; adds the bodies to `model`."""
    add_bodies(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto)
    return ReferenceEvaluator(proto).run(None, dict(feed))
