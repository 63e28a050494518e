"""Transformers of diffusers that nobody described: roles, inputs and axes are assumed, and every assumption is told.

What is assumed holds for most: latents of the config's `sample_size`, text embeddings and a timestep, by the names that
diffusers gives them. A forward that asks for more is refused when inputs are needed.
"""

import inspect
from functools import partial

import diffusers
import torch
from diffusers.models import transformers

from dit2deploy.base.errors import Misuse
from dit2deploy.models.family import BATCH, Axis, Config, Family, Inputs, random_inputs, spread

_LATENTS, _TEXT, _TIMESTEP = "hidden_states", "encoder_hidden_states", "timestep"
_ASSUMED = (_LATENTS, _TEXT, _TIMESTEP)
_TEXT_CHANNELS = ("caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cross_attention_dim")
_TEXT_TOKENS = 16
_DESCRIBE = "Describe the family in dit2deploy/models (see dit.py for one of 40 lines)."
_ROLES = (
    (r"proj_out.*|norm_out\..*|final_layer\..*", "final"),
    (r".*(norm\w*|adaln\w*|adaLN\w*)\.(linear|proj)(\..*)?|.*(modulation|time_proj).*", "modulation"),
    (r".*blocks\.\d+\..*|.*layers\.\d+\..*", "block"),
    (r".*(embed|proj_in|caption|context).*", "embedding"),
)


def is_transformer(class_name: str) -> bool:
    """Whether diffusers exports a class of that name among its transformers: such may be built from a config."""
    kind = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    if not (inspect.isclass(kind) and issubclass(kind, torch.nn.Module)):
        return False
    return kind.__module__.startswith(f"{transformers.__name__}.")


def generic(class_name: str) -> Family:
    """A family for a transformer of diffusers without a description."""
    return Family(
        name="generic",
        class_name=class_name,
        roles=_ROLES,
        inputs=partial(_inputs, class_name),
        axes=partial(_axes, class_name),
        tiny={},
        conditioning="unknown",
        assumptions=(
            f"{class_name} is no described family: roles of its layers are guessed from their names",
            f"{class_name}: inputs are assumed: latents of sample_size, {_TEXT_TOKENS} text tokens, timesteps in "
            "0 .. 1000; all sizes but the batch are fixed",
        ),
    )


def _asked(class_name: str) -> list[str]:
    """Which of the assumed inputs the class's forward takes. Raises Misuse where it needs others."""
    parameters = inspect.signature(getattr(diffusers, class_name).forward).parameters
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in ("self", "return_dict", *_ASSUMED)
    ]
    missing = [name for name in (_LATENTS, _TIMESTEP) if name not in parameters]
    if needed or missing:
        what = f"also asks for {', '.join(needed)}" if needed else f"takes no {missing[0]}"
        raise Misuse(f"{class_name}: is no described family, and its forward {what}.", _DESCRIBE)
    return [name for name in _ASSUMED if name in parameters]


def _axes(class_name: str, config: Config) -> dict[str, dict[int, Axis]]:
    return {name: {0: BATCH} for name in _asked(class_name)}


def _inputs(class_name: str, config: Config, *, batch: int, seed: int, second: bool = False) -> Inputs:
    asked = _asked(class_name)
    channels, size = config.get("in_channels"), config.get("sample_size")
    width = next((config[name] for name in _TEXT_CHANNELS if config.get(name)), None)
    told = {"in_channels": channels, "sample_size": size, **({_TEXT_CHANNELS[0]: width} if _TEXT in asked else {})}
    for name, value in told.items():
        if not isinstance(value, int):
            raise Misuse(f"{class_name}: is no described family, and its config tells no {name}.", _DESCRIBE)
    shapes = {_LATENTS: (batch, channels, size, size), _TEXT: (batch, _TEXT_TOKENS, width)}
    made = random_inputs(seed, **{name: shapes[name] for name in asked if name in shapes})
    return {**made, _TIMESTEP: spread(batch, seed)}
