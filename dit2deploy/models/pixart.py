"""PixArt-alpha and -sigma: text-conditional, one shared adaLN (Chen et al. 2023).

Their pipelines fill texts up to one length and pass a mask; the alpha of 1024 pixels is told resolution and aspect
ratio too, in a dictionary: a module of this family is called with all of them as tensors.
"""

from functools import partial
from typing import Any

import torch

from dit2deploy.models.family import BATCH, Axis, Config, Family, Inputs, random_inputs, spread
from dit2deploy.models.folds import Fold, Linears, blocks, by_values
from dit2deploy.models.positions import resize_positions


def _shape(config: Config) -> tuple[int, ...]:
    return config["in_channels"], config["sample_size"], config["sample_size"]


def _is_told_sizes(config: Config) -> bool:
    told = config["use_additional_conditions"]
    return config["sample_size"] == 128 if told is None else told


def _inputs(config: Config, *, batch: int, seed: int, second: bool = False) -> Inputs:
    # A graph holds the position embedding of one size: batch and text are the dynamic axes.
    tokens = 9 if second else 6
    text = (batch, tokens, config["caption_channels"] or config["cross_attention_dim"])
    lengths = tokens - torch.arange(batch) % tokens
    inputs = {
        **random_inputs(seed, hidden_states=(batch, *_shape(config)), encoder_hidden_states=text),
        "encoder_attention_mask": (torch.arange(tokens) < lengths.unsqueeze(1)).long(),
        "timestep": spread(batch, seed).long(),
    }
    if _is_told_sizes(config):
        pixels = 8.0 * config["sample_size"]
        inputs |= {"resolution": torch.full((batch, 2), pixels), "aspect_ratio": torch.ones(batch, 1)}
    return inputs


def _axes(config: Config) -> dict[str, dict[int, Axis]]:
    tokens = Axis("text_tokens", usual=120, longest=300)  # of alpha and of sigma
    axes = {
        "hidden_states": {0: BATCH},
        "encoder_hidden_states": {0: BATCH, 1: tokens},
        "encoder_attention_mask": {0: BATCH, 1: tokens},
        "timestep": {0: BATCH},
    }
    return axes | ({"resolution": {0: BATCH}, "aspect_ratio": {0: BATCH}} if _is_told_sizes(config) else {})


def _adapt(module: Any) -> None:
    module.forward = partial(_forward, module)


def _forward(
    module: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    resolution: torch.Tensor | None = None,
    aspect_ratio: torch.Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """diffusers' forward with the sizes, float32 [B, 2] and [B, 1], out of their dictionary."""
    return type(module).forward(
        module,
        hidden_states,
        encoder_hidden_states,
        timestep,
        added_cond_kwargs={"resolution": resolution, "aspect_ratio": aspect_ratio},
        encoder_attention_mask=encoder_attention_mask,
        return_dict=return_dict,
    )


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The sizes out of their dictionary; a mask of whole texts where none is given."""
    sizes = given.pop("added_cond_kwargs", None) or {}
    if given.get("encoder_attention_mask") is None:
        given["encoder_attention_mask"] = torch.ones(given["encoder_hidden_states"].shape[:2], dtype=torch.int64)
    return given | {name: value for name, value in sizes.items() if value is not None}


def _folds(linears: Linears) -> list[Fold]:
    # The modulation is shared by all blocks, so it can take no block's factors.
    attentions = [f"{block}.attn{side}" for block in blocks(linears, "transformer_blocks") for side in (1, 2)]
    return [fold for name in attentions for fold in by_values(linears, [f"{name}.to_v"], [f"{name}.to_out.0"])]


PIXART = Family(
    name="pixart",
    class_name="PixArtTransformer2DModel",
    roles=(
        (r"adaln_single\.linear", "modulation"),
        (r"adaln_single\.emb\..*|caption_projection\..*", "embedding"),
        (r"transformer_blocks\.\d+\..*", "block"),
        (r"proj_out", "final"),
    ),
    inputs=_inputs,
    axes=_axes,
    tiny={
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "cross_attention_dim": 48,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "use_additional_conditions": False,
        "caption_channels": 32,
    },
    latent_shape=_shape,
    adapt=_adapt,
    arguments=_arguments,
    resize=lambda module, size: resize_positions(module.pos_embed, size),
    folds=_folds,
)
