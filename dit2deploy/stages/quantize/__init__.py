"""Stage quantize: model, policy and calibration set to a quantized checkpoint."""

from dit2deploy.stages.quantize.estimate import estimate
from dit2deploy.stages.quantize.quantize import quantize

__all__ = ["estimate", "quantize"]
