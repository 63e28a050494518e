"""Families of transformers: THE list; other transformers of diffusers take the generic way."""

from dit2deploy.models.dit import DIT
from dit2deploy.models.family import Family
from dit2deploy.models.flux import FLUX
from dit2deploy.models.generic import generic, is_transformer
from dit2deploy.models.pixart import PIXART
from dit2deploy.models.sd3 import SD3
from dit2deploy.models.wan import WAN
from dit2deploy.models.z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (DIT, PIXART, SD3, FLUX, Z_IMAGE, WAN)


def family_of(class_name: str) -> Family | None:
    """The family of a class of diffusers; None for what is no transformer there and must not be built."""
    for family in FAMILIES:
        if family.class_name == class_name:
            return family
    return generic(class_name) if is_transformer(class_name) else None


__all__ = ["FAMILIES", "Family", "family_of"]
