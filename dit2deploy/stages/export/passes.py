"""The optimizer passes, in order: onnx_ir's and ours. The exporter's own list is quadratic in the size of the graph."""

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer._constant_folding import FoldConstantsPass

from dit2deploy.stages.export.attach import is_weight
from dit2deploy.stages.export.quiet import quiet


def _may_fold(node: ir.Node) -> bool | None:
    # A folded weight would be an anonymous copy in memory, unknown to the checkpoint.
    return False if any(is_weight(value) for value in node.inputs) else None


def simplify(model: ir.Model) -> None:
    """Inlines, folds constants, merges equal small initializers and equal nodes (q, k and v share one quantization)."""
    for step in (
        common.InlinePass(),
        FoldConstantsPass(shape_inference=True, input_size_limit=8192, output_size_limit=2**19, should_fold=_may_fold),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.IdentityEliminationPass(),
        skip_divisions_by_one,
        common.CommonSubexpressionEliminationPass(),
    ):
        with quiet():
            step(model)


def skip_divisions_by_one(model: ir.Model) -> None:
    """Readers of x / 1 read x: diffusers' attention divides by `rescale_output_factor`."""
    for node in list(model.graph):
        if node.domain or node.op_type != "Div" or node.outputs[0].is_graph_output():
            continue
        divisor = node.inputs[1].const_value
        if divisor is not None and tuple(divisor.shape) == () and divisor.numpy() == 1:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)


def tidy(model: ir.Model) -> None:
    """Removes what the fusing passes left over and makes names unique."""
    for step in (common.RemoveUnusedNodesPass(), common.NameFixPass()):
        step(model)
