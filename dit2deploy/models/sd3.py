"""Stable Diffusion 3 and 3.5: MM-DiT (Esser et al. 2024)."""

from dit2deploy.models.family import SMALL_BATCH, Axis, Config, Family, Inputs, random_inputs, spread
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
    size = config["sample_size"]
    height, width = (
        Axis(name, config["patch_size"], config["pos_embed_max_size"], usual=size, longest=size * 3 // 2)
        for name in ("height", "width")
    )
    # CLIP's 77 and T5's: 256 by default, 512 at most.
    text = Axis("text_tokens", usual=77 + 256, longest=77 + 512)
    return {
        "hidden_states": {0: SMALL_BATCH, 2: height, 3: width},
        "encoder_hidden_states": {0: SMALL_BATCH, 1: text},
        "pooled_projections": {0: SMALL_BATCH},
        "timestep": {0: SMALL_BATCH},
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
