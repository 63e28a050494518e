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
        common.CommonSubexpressionEliminationPass(),
    ):
        with quiet():
            step(model)


def tidy(model: ir.Model) -> None:
    """Removes what the fusing passes left over and makes names unique."""
    for step in (common.RemoveUnusedNodesPass(), common.NameFixPass()):
        step(model)
