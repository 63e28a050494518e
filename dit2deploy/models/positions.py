"""The table of positions that diffusers' PatchEmbed adds to an image's tokens, for latents of another size."""

import torch
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed

from dit2deploy.artefacts.onnx_model import Size
from dit2deploy.base.errors import Misuse


def resize_positions(embedding: PatchEmbed, size: Size) -> None:
    """Gives it the table of this size, so that a graph holds it as a constant: PatchEmbed itself makes it at each call,
    in float64. The table is no part of the state_dict. Raises Misuse for a size that is no whole number of patches."""
    patch = embedding.patch_size
    if any(length < patch or length % patch for length in size):
        raise Misuse(f"latents of {size[0]}x{size[1]} are no multiple of the patch {patch}.", "Take one that is.")
    embedding.height, embedding.width = (length // patch for length in size)
    table = get_2d_sincos_pos_embed(
        embed_dim=embedding.pos_embed.shape[-1],
        grid_size=(embedding.height, embedding.width),
        base_size=embedding.base_size,
        interpolation_scale=embedding.interpolation_scale,
        output_type="pt",
    )
    embedding.pos_embed = torch.as_tensor(table).float().unsqueeze(0)
