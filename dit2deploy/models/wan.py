"""Wan 2.x: text-to-video (and image-to-video) transformer with 3-D rotary positions (Wan Team 2025)."""

from dit2deploy.models.family import SMALL_BATCH, Axis, Config, Family, Inputs, random_inputs, spread

_IMAGE_TOKENS = 257  # of the CLIP vision encoder


def _inputs(config: Config, *, batch: int, seed: int, second: bool = False) -> Inputs:
    frame, height, width = config["patch_size"]
    frames, rows, columns, text = (4, 6, 5, 9) if second else (3, 4, 4, 6)
    size = frames * frame, rows * height, columns * width
    shapes = {
        "hidden_states": (batch, config["in_channels"], *size),
        "encoder_hidden_states": (batch, text, config["text_dim"]),
    }
    if config["image_dim"] is not None:
        shapes["encoder_hidden_states_image"] = (batch, _IMAGE_TOKENS, config["image_dim"])
    return {**random_inputs(seed, **shapes), "timestep": spread(batch, seed)}


def _axes(config: Config) -> dict[str, dict[int, Axis]]:
    frame, height, width = config["patch_size"]
    most = config["rope_max_seq_len"]
    size = {  # 81 frames of 480 x 832 pixels, lying or standing
        2: Axis("frames", frame, most, usual=21, longest=21),
        3: Axis("height", height, most, usual=60, longest=104),
        4: Axis("width", width, most, usual=104, longest=104),
    }
    axes = {
        "hidden_states": {0: SMALL_BATCH, **size},
        "encoder_hidden_states": {0: SMALL_BATCH, 1: Axis("text_tokens", usual=512, longest=512)},
        "timestep": {0: SMALL_BATCH},
    }
    return axes | ({"encoder_hidden_states_image": {0: SMALL_BATCH}} if config["image_dim"] is not None else {})


WAN = Family(
    name="wan",
    class_name="WanTransformer3DModel",
    roles=(
        (r"condition_embedder\.time_proj", "modulation"),
        (r"condition_embedder\..*", "embedding"),
        (r"blocks\.\d+\..*", "block"),
        (r"proj_out", "final"),
    ),
    inputs=_inputs,
    axes=_axes,
    tiny={
        "patch_size": [1, 2, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 96,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    },
)
