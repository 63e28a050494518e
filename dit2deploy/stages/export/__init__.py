"""Lowering to ONNX: a checkpoint in form "fused" or "qdq", or the full-precision model in form "float"."""

from dit2deploy.stages.export.export import export, export_float

__all__ = ["export", "export_float"]
