"""Z-Image: one stream of image and text tokens with 3-D rotary positions (Alibaba Z-Image Team 2025).

diffusers' forward takes lists of samples, pads each in Python and rotates by complex numbers: no graph can hold that.
So a module of this family is given another forward with the same arithmetic in tensors, and batch, text and image size
stay dynamic. Tokens come in multiples of 32: images of other sizes, which diffusers pads, are refused.
"""

from functools import partial
from typing import Any

import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.models.family import SMALL_BATCH, Axis, Config, Family, Inputs, random_inputs, spread
from dit2deploy.models.folds import Fold, Linears, blocks, by_values

_MULTIPLE = 32  # of tokens; 8 rows of patches and 4 columns make as many
_ROWS, _COLUMNS = 8, 4
_STEPS = 1000.0  # training steps; diffusers' `t` is (1000 - timestep) / 1000
_BLOCKS = ("noise_refiner", "context_refiner", "layers")


def _inputs(config: Config, *, batch: int, seed: int, second: bool = False) -> Inputs:
    patch, frame = config["all_patch_size"][0], config["all_f_patch_size"][0]
    rows, columns, text = (3, 3, 3 * _MULTIPLE) if second else (2, 2, 2 * _MULTIPLE)
    shape = (batch, config["in_channels"], frame, rows * _ROWS * patch, columns * _COLUMNS * patch)
    return {
        **random_inputs(seed, hidden_states=shape, encoder_hidden_states=(batch, text, config["cap_feat_dim"])),
        "text_lengths": text - 17 * torch.arange(batch) % text,
        "timestep": spread(batch, seed),
    }


def _axes(config: Config) -> dict[str, dict[int, Axis]]:
    patch, (most_text, most_rows, most_columns) = config["all_patch_size"][0], config["axes_lens"]
    # 1024 x 1024 pixels, and 3/2 of a side.
    rows = Axis("height", _ROWS * patch, most_rows // _ROWS, usual=128, longest=192)
    columns = Axis("width", _COLUMNS * patch, most_columns // _COLUMNS, usual=128, longest=192)
    # The image's first position is the one behind the text.
    text = Axis("text_tokens", _MULTIPLE, (most_text - 2) // _MULTIPLE, usual=128, longest=512)
    return {
        "hidden_states": {0: SMALL_BATCH, 3: rows, 4: columns},
        "encoder_hidden_states": {0: SMALL_BATCH, 1: text},
        "text_lengths": {0: SMALL_BATCH},
        "timestep": {0: SMALL_BATCH},
    }


def _adapt(module: Any) -> None:
    """Gives the module its forward in tensors, real tables of cosines and sines, and processors that use them."""
    tables = module.rope_embedder.precompute_freqs_cis(
        module.config["axes_dims"], module.config["axes_lens"], theta=module.config["rope_theta"]
    )
    for axis, table in enumerate(tables):
        module.register_buffer(f"rotary_{axis}", torch.view_as_real(table).contiguous(), persistent=False)
    for name in _BLOCKS:
        for block in module.get_submodule(name):
            block.attention.set_processor(RealAttnProcessor())
    module.forward = partial(_forward, module)


def _forward(
    module: Any,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    text_lengths: torch.Tensor,
    return_dict: bool = False,
) -> tuple[torch.Tensor]:
    """ZImageTransformer2DModel.forward of one image a sample: latents float32 [B, C, F, H, W], timesteps float32 [B] in
    0 .. 1000, text [B, L, D] of which the first text_lengths int64 [B] tokens count -> ([B, C, F, H, W],)."""
    patch, frame = module.config["all_patch_size"][0], module.config["all_f_patch_size"][0]
    b, c, frames, height, width = hidden_states.shape
    size = frames // frame, height // patch, width // patch
    given, counted = _text_masks(text_lengths, encoder_hidden_states.shape[1])

    x = hidden_states.reshape(b, c, size[0], frame, size[1], patch, size[2], patch)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, size[0] * size[1] * size[2], frame * patch * patch * c)
    x = module.all_x_embedder[f"{patch}-{frame}"](x)
    text = torch.where(given.unsqueeze(-1), module.cap_embedder(encoder_hidden_states), module.cap_pad_token)

    image_rotary = _image_rotary(module, counted.sum(1), size)
    text_rotary = _text_rotary(module, text)
    modulation = module.t_embedder((_STEPS - timestep) / _STEPS * module.t_scale)
    for block in module.noise_refiner:
        x = block(x, None, image_rotary, modulation)
    for block in module.context_refiner:
        text = block(text, counted, text_rotary)
    tokens = x.shape[1]
    x = torch.cat([x, text], 1)
    mask = torch.cat([torch.ones_like(x[:, :tokens, 0], dtype=torch.bool), counted], 1)
    rotary = torch.cat([image_rotary, text_rotary], 1)
    for block in module.layers:
        x = block(x, mask, rotary, modulation)
    x = module.all_final_layer[f"{patch}-{frame}"](x, c=modulation)[:, :tokens]

    x = x.reshape(b, *size, frame, patch, patch, c).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return (x.reshape(b, c, frames, height, width),)


def _text_masks(lengths: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens bool [B, L] are text, and which take part: each text is filled up to a multiple of 32."""
    places = torch.arange(tokens).unsqueeze(0)
    filled = (lengths + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE
    return places < lengths.unsqueeze(1), places < filled.unsqueeze(1)


def _text_rotary(module: Any, text: torch.Tensor) -> torch.Tensor:
    """float32 [B, L, D / 2, 2]: positions 1, 2, .. on the first axis."""
    places = 1 + torch.arange(text.shape[1])
    still = torch.zeros_like(places)
    rows = torch.cat([module.rotary_0[places], module.rotary_1[still], module.rotary_2[still]], 1)
    return rows.unsqueeze(0).expand(text.shape[0], -1, -1, -1)


def _image_rotary(module: Any, filled: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """float32 [B, tokens, D / 2, 2]: frame (counted on from the text's end, int64 [B]), row and column of a patch."""
    frames, rows, columns = (torch.arange(count) for count in size)
    first = module.rotary_0[filled.unsqueeze(1) + 1 + frames.unsqueeze(0)]
    whole = (filled.shape[0], *size, -1, 2)
    parts = (
        first[:, :, None, None].expand(whole),
        module.rotary_1[rows][None, None, :, None].expand(whole),
        module.rotary_2[columns][None, None, None].expand(whole),
    )
    return torch.cat(parts, 4).flatten(1, 3)


class RealAttnProcessor:
    """diffusers' ZSingleStreamAttnProcessor with rotations as pairs of real numbers, `freqs_cis` [B, L, D / 2, 2]."""

    def __call__(
        self,
        attn: Any,  # diffusers' Attention
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = (
            linear(hidden_states).unflatten(-1, (attn.heads, -1)) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key = _rotated(query, freqs_cis), _rotated(key, freqs_cis)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        y = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )
        return attn.to_out[0](y.transpose(1, 2).flatten(2))


def _rotated(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """x float32 [B, L, heads, D]: neighbouring channels are one complex number."""
    pairs, rotary = x.unflatten(-1, (-1, 2)), rotary.unsqueeze(2)
    a, b, cos, sin = pairs[..., 0], pairs[..., 1], rotary[..., 0], rotary[..., 1]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(3)


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """diffusers' lists of samples as tensors, texts filled up to the longest one's multiple of 32."""
    images, t, texts = (given.pop(name) for name in ("x", "t", "cap_feats"))
    if isinstance(images[0], list):
        raise Misuse("Z-Image Omni's lists of several images a sample are not served.", "Give one image a sample.")
    lengths = torch.tensor([len(text) for text in texts])
    tokens = -(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE
    latents = torch.stack(list(images))
    if (latents[0, 0].numel() // given["patch_size"] ** 2) % _MULTIPLE:
        raise Misuse(
            f"Z-Image: latents of {latents.shape[-2]} x {latents.shape[-1]} are no multiple of {_MULTIPLE} patches.",
            "Take a height that is a multiple of 128 pixels and a width that is one of 64.",
        )
    return {
        **given,
        "hidden_states": latents,
        "timestep": _STEPS - _STEPS * t,
        "encoder_hidden_states": torch.stack([_filled(text, tokens) for text in texts]),
        "text_lengths": lengths,
    }


def _filled(text: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.nn.functional.pad(text, (0, 0, 0, tokens - len(text)))


def _folds(linears: Linears) -> list[Fold]:
    found = []
    for block in (name for part in _BLOCKS for name in blocks(linears, part)):
        found += by_values(linears, [f"{block}.attention.to_v"], [f"{block}.attention.to_out.0"])
        # w2 reads silu(w1 x) * (w3 x)
        found += by_values(linears, [f"{block}.feed_forward.w3"], [f"{block}.feed_forward.w2"])
    return found


Z_IMAGE = Family(
    name="z-image",
    class_name="ZImageTransformer2DModel",
    roles=(
        (r"(noise_refiner|layers)\.\d+\.adaLN_modulation\.0", "modulation"),
        (r"(noise_refiner|context_refiner|layers)\.\d+\..*", "block"),
        (r"t_embedder\..*|cap_embedder\..*|all_x_embedder\..*", "embedding"),
        (r"all_final_layer\..*", "final"),
    ),
    inputs=_inputs,
    axes=_axes,
    tiny={
        "in_channels": 4,
        "dim": 48,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 32,
        "axes_dims": [4, 6, 6],
        "axes_lens": [130, 32, 32],
    },
    adapt=_adapt,
    arguments=_arguments,
    result=lambda sample: list(sample.unbind(0)),
    folds=_folds,
    assumptions=(f"images of a whole multiple of {_MULTIPLE} tokens: height % 128 == 0 and width % 64 == 0 pixels",),
)
