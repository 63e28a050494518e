"""Which value of the graph is the output of which quantized layer."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from dit2deploy.base.errors import Failed

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class LayerOutput:
    """Channels begin:end of the last axis of `value`."""

    value: ir.Value
    begin: int
    end: int


def name_layer_outputs(model: ir.Model, layers: Iterable[str]) -> dict[str, LayerOutput]:
    """Finds each layer's output by the exporter's record of modules and names the value as the layer.

    Layers come back in execution order. Raises Failed for a layer that no node belongs to.
    """
    wanted, found = set(layers), {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        for layer in wanted.intersection(scopes):
            found[layer] = node.outputs[0]
    for layer in wanted:
        if layer not in found:
            raise Failed(f"Layer {layer} is nowhere in the graph.", "Report it with the model's config.json.")
    for layer, value in found.items():
        value.name = layer
    return {layer: LayerOutput(value, 0, int(value.shape[-1])) for layer, value in found.items()}
