"""Stable Diffusion 3 and 3.5: MM-DiT (Esser et al. 2024)."""

from dit2deploy.models.family import BATCH, Axis, Config, Family, Inputs, random_inputs, spread
from dit2deploy.models.folds import Fold, Linears, blocks, joint_block


def _inputs(config: Config, *, batch: int, seed: int, second: bool = False) -> Inputs:
    patch, most = config["patch_size"], config["pos_embed_max_size"]
    height, width, text = (min(6, most), min(5, most), 9) if second else (min(4, most), min(4, most), 6)
    return {
        **random_inputs(
            seed,
            hidden_states=(batch, config["in_channels"], height * patch, width * patch),
            encoder_hidden_states=(batch, text, config["joint_attention_dim"]),
            pooled_projections=(batch, config["pooled_projection_dim"]),
        ),
        "timestep": spread(batch, seed),
    }


def _axes(config: Config) -> dict[str, dict[int, Axis]]:
    patch, most = config["patch_size"], config["pos_embed_max_size"]
    return {
        "hidden_states": {0: BATCH, 2: Axis("height", patch, most), 3: Axis("width", patch, most)},
        "encoder_hidden_states": {0: BATCH, 1: Axis("text_tokens")},
        "pooled_projections": {0: BATCH},
        "timestep": {0: BATCH},
    }


def _folds(linears: Linears) -> list[Fold]:
    return [fold for block in blocks(linears, "transformer_blocks") for fold in joint_block(linears, block)]


SD3 = Family(
    name="sd3",
    class_name="SD3Transformer2DModel",
    roles=(
        (r"transformer_blocks\.\d+\.norm1(_context)?\.linear", "modulation"),
        (r"transformer_blocks\.\d+\..*", "block"),
        (r"time_text_embed\..*|context_embedder", "embedding"),
        (r"norm_out\.linear|proj_out", "final"),
    ),
    inputs=_inputs,
    axes=_axes,
    tiny={
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 32,
        "caption_projection_dim": 48,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 12,
    },
    folds=_folds,
)
