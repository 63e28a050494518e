"""Where TQ-DiT's quantizers can go: attentions whose products can be taken over, and linears that read a GELU.

They are told by the classes of diffusers, which know better than patterns of names whether a config has a GELU there.
"""

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.models.z_image import RealAttnProcessor

_CURE = "Write the policy anew with `dit2deploy search`."


# They ask torch for one attention each, with one key a query head and no causal mask.
_PROCESSORS = (AttnProcessor2_0, JointAttnProcessor2_0, FluxAttnProcessor, WanAttnProcessor, RealAttnProcessor)


def attentions_of(module: torch.nn.Module) -> list[str]:
    """The attentions of a transformer whose products nn.attention can take over, by module name."""
    return [
        name
        for name, attention in module.named_modules()
        if type(getattr(attention, "processor", None)) in _PROCESSORS
        and not (isinstance(attention, WanAttention) and attention.add_k_proj is not None)  # a second one, of an image
    ]


def after_gelu(module: torch.nn.Module) -> list[str]:
    """The linears whose input is a GELU: the second ones of MLPs, by module name."""
    return [
        f"{name}.net.2"
        for name, feed_forward in module.named_modules()
        if isinstance(feed_forward, FeedForward) and isinstance(feed_forward.net[0], GELU)
    ]


def check_places(module: torch.nn.Module, policy: Policy) -> None:
    """Misuse for attentions and regions of the policy that the full-precision module has no place for."""
    attentions, gelus = attentions_of(module), after_gelu(module)
    for name in policy.attentions:
        if name not in attentions:
            raise Misuse(f"the policy names attention {name}, which the model has not or not in a known form.", _CURE)
    for name, layer in policy.layers.items():
        if layer.is_quantized and layer.regions == "gelu" and name not in gelus:
            raise Misuse(f"the policy gives layer {name} the regions of GELU, but its input is no GELU.", _CURE)
