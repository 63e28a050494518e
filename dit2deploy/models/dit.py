"""DiT: class-conditional, adaLN-zero (Peebles and Xie 2022), as diffusers has it."""

from typing import Any

import torch

from dit2deploy.artefacts.onnx_model import Size
from dit2deploy.base.errors import Misuse
from dit2deploy.models.family import BATCH, Config, Family, Inputs, random_inputs, spread
from dit2deploy.models.folds import Fold, Linears, blocks, by_modulation, by_values
from dit2deploy.models.positions import resize_positions


def _shape(config: Config) -> tuple[int, ...]:
    return config["in_channels"], config["sample_size"], config["sample_size"]


def _inputs(config: Config, *, batch: int, seed: int, second: bool = False) -> Inputs:
    # A graph holds the position embedding and the square token grid of one size: batch is the only dynamic axis.
    generator = torch.Generator().manual_seed(seed)
    return {
        **random_inputs(seed, hidden_states=(batch, *_shape(config))),
        "timestep": spread(batch, seed).long(),
        "class_labels": torch.randint(config["num_embeds_ada_norm"], (batch,), generator=generator),
    }


def _folds(linears: Linears) -> list[Fold]:
    found = []
    for block in blocks(linears, "transformer_blocks"):
        norm, attention = f"{block}.norm1.linear", [f"{block}.attn1.to_{letter}" for letter in "qkv"]
        # norm1.linear gives shift, scale and gate of attention, then those of the MLP
        found += by_modulation(linears, norm, attention, parts=6, shift=0, scale=1)
        found += by_modulation(linears, norm, [f"{block}.ff.net.0.proj"], parts=6, shift=3, scale=4)
        found += by_values(linears, [attention[2]], [f"{block}.attn1.to_out.0"])
    return found


def _resize(module: Any, size: Size) -> None:
    if size[0] != size[1]:
        raise Misuse(f"{DIT.class_name}: latents of {size[0]}x{size[1]} are not square.", "Take equal sides.")
    resize_positions(module.pos_embed, size)


DIT = Family(
    name="dit",
    class_name="DiTTransformer2DModel",
    roles=(
        (r"transformer_blocks\.\d+\.norm1\.linear", "modulation"),
        (r"transformer_blocks\.\d+\.norm1\.emb\..*", "embedding"),
        (r"transformer_blocks\.\d+\..*", "block"),
        (r"proj_out_[12]", "final"),
    ),
    inputs=_inputs,
    axes=lambda config: {name: {0: BATCH} for name in ("hidden_states", "timestep", "class_labels")},
    tiny={
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    },
    conditioning="class",
    null_label=lambda config: config["num_embeds_ada_norm"],
    latent_shape=_shape,
    resize=_resize,
    folds=_folds,
)
