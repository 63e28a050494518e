"""Engines with activations in half precision on a machine without a GPU: the lowered graph of the tiny DiT, node by
node, each op of ours by its definition in the type that its attribute says."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from dit2deploy.ops import DOMAIN, OPS
from dit2deploy.ops.op import Op
from dit2deploy.targets.float_types import HALVES, use_half_activations
from dit2deploy.targets.graph import add_outputs, drop_native_bodies, save_streamed
from tests.bundles import sources
from tests.tensors import as_array, as_tensor


def evaluator_of(op: Op) -> type[OpRun]:
    """The op by its definition, in whatever type its attribute says."""

    def run(self, *inputs, plugin_namespace=None, plugin_version=None, **attributes):
        return tuple(map(as_array, op.compute(*(as_tensor(value.copy()) for value in inputs), **attributes)))

    return type(op.name, (OpRun,), {"op_domain": DOMAIN, "op_schema": op.schema(), "_run": run})


def lowered(floats: str, change: Callable[[ir.Model], None] = lambda model: None) -> ir.Model:
    """The tiny DiT's graph, changed, in a type of FLOATS."""
    model = ir.load(sources().onnx / "model.onnx")
    drop_native_bodies(model)
    change(model)
    if floats in HALVES:
        use_half_activations(model, floats)
    return model


def evaluator(model: ir.Model) -> ReferenceEvaluator:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_streamed(model, path)
        return ReferenceEvaluator(onnx.load(path), new_ops=[evaluator_of(op) for op in OPS if op.native])


def target(floats: str, change: Callable[[ir.Model], None] = lambda model: None) -> SimpleNamespace:
    """What stage parity asks of a target: one that opens such an engine whatever the bundle holds."""

    def opened(_bundle, *, threads: int | None = None, values: Sequence[str] = ()) -> SimpleNamespace:
        model = lowered(floats, change)
        add_outputs(model, values)
        names, run = [value.name for value in model.graph.outputs], evaluator(model).run
        return SimpleNamespace(
            run=lambda inputs: dict(zip(names, run(None, dict(inputs)), strict=True)), close=lambda: None
        )

    return SimpleNamespace(name=floats, open=opened)
