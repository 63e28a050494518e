"""Removes what the exporters wrote about the machine they ran on: stack traces, paths, module classes."""

import onnx_ir as ir


def strip_metadata(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _strip(value)
    for node in model.graph:
        _strip(node)
        for value in node.outputs:
            _strip(value)


def _strip(item: ir.Node | ir.Value) -> None:
    item.metadata_props.clear()
    item.doc_string = None
