"""Stage quantize: model, policy and calibration set to a quantized checkpoint."""

from dit2deploy.stages.quantize.quantize import quantize

__all__ = ["quantize"]
