"""Stage parity: does the engine compute the quantized model, and what did quantization cost?"""

from dit2deploy.stages.parity.parity import parity
from dit2deploy.stages.parity.summary import summary

__all__ = ["parity", "summary"]
