"""DiT: class-conditional, adaLN-zero (Peebles and Xie 2022), as diffusers has it."""

import torch

from dit2deploy.models.family import BATCH, Config, Family, Inputs, random_inputs, spread


def _shape(config: Config) -> tuple[int, ...]:
    return config["in_channels"], config["sample_size"], config["sample_size"]


def _inputs(config: Config, *, batch: int, seed: int, second: bool = False) -> Inputs:
    # The position embedding and the square token grid are fixed by sample_size: batch is the only dynamic axis.
    generator = torch.Generator().manual_seed(seed)
    return {
        **random_inputs(seed, hidden_states=(batch, *_shape(config))),
        "timestep": spread(batch, seed).long(),
        "class_labels": torch.randint(config["num_embeds_ada_norm"], (batch,), generator=generator),
    }


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
)
