"""Families of transformers: THE list, and the classes of diffusers that may be built from a config."""

from dit2deploy.models.dit import DIT
from dit2deploy.models.family import Family, generic
from dit2deploy.models.flux import FLUX
from dit2deploy.models.pixart import PIXART
from dit2deploy.models.sd3 import SD3
from dit2deploy.models.wan import WAN
from dit2deploy.models.z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (DIT, PIXART, SD3, FLUX, Z_IMAGE, WAN)

# Classes without a described family: they load, quantize and run in PyTorch; their roles are guessed.
GENERIC: tuple[str, ...] = (
    "AuraFlowTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "HunyuanDiT2DModel",
    "LTXVideoTransformer3DModel",
    "Lumina2Transformer2DModel",
    "LuminaNextDiT2DModel",
    "QwenImageTransformer2DModel",
    "SanaTransformer2DModel",
)


def family_of(class_name: str) -> Family | None:
    """The family of a class of diffusers; None for a class that must not be built."""
    for family in FAMILIES:
        if family.class_name == class_name:
            return family
    return generic(class_name) if class_name in GENERIC else None


__all__ = ["FAMILIES", "GENERIC", "Family", "family_of"]
