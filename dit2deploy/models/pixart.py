"""PixArt-alpha and -sigma: text-conditional, one shared adaLN (Chen et al. 2023)."""

from dit2deploy.base.errors import Misuse
from dit2deploy.models.family import BATCH, Axis, Config, Family, Inputs, random_inputs, spread
from dit2deploy.models.folds import Fold, Linears, blocks, by_values
from dit2deploy.models.positions import resize_positions


def _shape(config: Config) -> tuple[int, ...]:
    return config["in_channels"], config["sample_size"], config["sample_size"]


def _inputs(config: Config, *, batch: int, seed: int, second: bool = False) -> Inputs:
    if config["use_additional_conditions"] or (
        config["use_additional_conditions"] is None and config["sample_size"] == 128
    ):
        raise Misuse(
            "This PixArt is conditioned on resolution and aspect ratio, which is not served yet.",
            "Take one with a sample_size below 128 (PixArt-XL-2-512x512).",
        )
    # A graph holds the position embedding of one size: batch and text are the dynamic axes.
    text = (batch, 9 if second else 6, config["caption_channels"] or config["cross_attention_dim"])
    return {
        **random_inputs(seed, hidden_states=(batch, *_shape(config)), encoder_hidden_states=text),
        "timestep": spread(batch, seed).long(),
    }


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
    axes=lambda config: {
        "hidden_states": {0: BATCH},
        "encoder_hidden_states": {0: BATCH, 1: Axis("text_tokens")},
        "timestep": {0: BATCH},
    },
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
    resize=lambda module, size: resize_positions(module.pos_embed, size),
    folds=_folds,
    assumptions=("text is passed without an attention mask: give tokens without padding",),
)
