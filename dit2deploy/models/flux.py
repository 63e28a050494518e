"""FLUX.1: double- and single-stream blocks over packed image and text tokens (Black Forest Labs 2024)."""

import torch

from dit2deploy.models.family import SMALL_BATCH, Axis, Config, Family, Inputs, random_inputs, spread
from dit2deploy.models.folds import Fold, Linears, blocks, by_modulation, joint_block

IMAGE_TOKENS = Axis("image_tokens", usual=64 * 64, longest=64 * 128)  # 1024 x 1024 pixels; 2 million
TEXT_TOKENS = Axis("text_tokens", usual=512, longest=512)


def _grid(height: int, width: int) -> torch.Tensor:
    """float32 [height * width, 3] ids of image tokens: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), -1).reshape(-1, 3).float()


def _inputs(config: Config, *, batch: int, seed: int, second: bool = False) -> Inputs:
    (height, width), text = ((4, 6), 9) if second else ((4, 4), 6)
    inputs = random_inputs(
        seed,
        hidden_states=(batch, height * width, config["in_channels"]),
        encoder_hidden_states=(batch, text, config["joint_attention_dim"]),
        pooled_projections=(batch, config["pooled_projection_dim"]),
    )
    # The pipeline passes timesteps in 0 .. 1; the transformer multiplies by 1000.
    inputs |= {
        "timestep": spread(batch, seed, end=1.0),
        "img_ids": _grid(height, width),
        "txt_ids": torch.zeros(text, 3),
    }
    return inputs | ({"guidance": torch.full((batch,), 3.5)} if config["guidance_embeds"] else {})


def _axes(config: Config) -> dict[str, dict[int, Axis]]:
    axes = {
        "hidden_states": {0: SMALL_BATCH, 1: IMAGE_TOKENS},
        "encoder_hidden_states": {0: SMALL_BATCH, 1: TEXT_TOKENS},
        "pooled_projections": {0: SMALL_BATCH},
        "timestep": {0: SMALL_BATCH},
        "img_ids": {0: IMAGE_TOKENS},
        "txt_ids": {0: TEXT_TOKENS},
    }
    return axes | ({"guidance": {0: SMALL_BATCH}} if config["guidance_embeds"] else {})


class RealRotaryEmbedding(torch.nn.Module):
    """FluxPosEmbed with angles in float32: runtimes lack float64 cosines. Within 2.2e-6 of it on a 64 x 64 grid.

    ids float32 [tokens, axes] -> cos, sin float32 [tokens, sum of axes_dim].
    """

    def __init__(self, theta: float, axes_dim: tuple[int, ...]) -> None:
        super().__init__()
        self.axes_dim = axes_dim
        for axis, dim in enumerate(axes_dim):
            frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            self.register_buffer(f"frequencies_{axis}", frequencies.float(), persistent=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = [
            (ids[:, axis : axis + 1].float() * getattr(self, f"frequencies_{axis}")).repeat_interleave(
                2, 1, output_size=dim
            )
            for axis, dim in enumerate(self.axes_dim)
        ]
        angle = torch.cat(angles, 1)
        return angle.cos(), angle.sin()


def _swap(module: torch.nn.Module) -> None:
    module.pos_embed = RealRotaryEmbedding(module.pos_embed.theta, tuple(module.pos_embed.axes_dim))


def _folds(linears: Linears) -> list[Fold]:
    found = [fold for block in blocks(linears, "transformer_blocks") for fold in joint_block(linears, block)]
    for block in blocks(linears, "single_transformer_blocks"):
        readers = [*(f"{block}.attn.to_{letter}" for letter in "qkv"), f"{block}.proj_mlp"]
        found += by_modulation(linears, f"{block}.norm.linear", readers, parts=3, shift=0, scale=1)
    return found


FLUX = Family(
    name="flux",
    class_name="FluxTransformer2DModel",
    roles=(
        (r"transformer_blocks\.\d+\.norm1(_context)?\.linear", "modulation"),
        (r"single_transformer_blocks\.\d+\.norm\.linear", "modulation"),
        (r"(single_)?transformer_blocks\.\d+\..*", "block"),
        (r"time_text_embed\..*|context_embedder|x_embedder", "embedding"),
        (r"norm_out\.linear|proj_out", "final"),
    ),
    inputs=_inputs,
    axes=_axes,
    tiny={
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "guidance_embeds": True,
        "axes_dims_rope": [4, 6, 6],
    },
    timestep_scale=1000.0,
    swap=_swap,
    folds=_folds,
)
