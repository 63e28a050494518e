"""Stage finetune: quantization-aware training of a quantized checkpoint against its full-precision teacher."""

from dit2deploy.stages.finetune.finetune import finetune
from dit2deploy.stages.finetune.settings import Settings

__all__ = ["Settings", "finetune"]
