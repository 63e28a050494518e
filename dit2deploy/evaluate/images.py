"""Images as pictures: arrays in -1..1 to grids of pixels, and PNG files without further libraries."""

import importlib.util
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import write_bytes

TILE = 64  # pixels: smaller images are enlarged by a whole number to at least this
GAP = 4
_CAPTION = 40  # width of the column of captions


def pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, C] of images [N, C, H, W] in -1..1 with one or three channels (others: Misuse)."""
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise Misuse(f"images have the shape {images.shape}.", "Give [N, 1 or 3, H, W] in -1..1.")
    clean = np.nan_to_num(images, nan=-1.0, posinf=1.0, neginf=-1.0)
    return np.rint((np.clip(clean, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def grid(rows: Sequence[np.ndarray], *, captions: Sequence[str] = (), tile: int = TILE) -> np.ndarray:
    """uint8 [H, W, C]: one row of tiles for each [N, C, h, w] of `rows`; captions, if any, stand left of the rows.

    Captions are drawn by Pillow and left out where it is not installed.
    """
    tiles = [_enlarged(pixels(row), tile) for row in rows]
    height, width, channels = tiles[0].shape[1:]
    count = max(len(row) for row in tiles)
    left = _CAPTION if captions and importlib.util.find_spec("PIL") else 0
    canvas = np.full(
        (GAP + len(tiles) * (height + GAP), left + GAP + count * (width + GAP), channels), 255, dtype=np.uint8
    )
    for index, row in enumerate(tiles):
        top = GAP + index * (height + GAP)
        for column, picture in enumerate(row):
            at = left + GAP + column * (width + GAP)
            canvas[top : top + height, at : at + width] = picture
        if left:
            canvas[top : top + height, :left] = _text(captions[index], height, left)[..., None]
    return canvas


def png(picture: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W, 1] (grey) or [H, W, 3] (RGB)."""
    height, width, channels = picture.shape
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # filter type 0 before each line
    lines[:, 1:] = picture.reshape(height, -1)
    colour = {1: 0, 3: 2}[channels]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )


def write_png(path: Path, picture: np.ndarray) -> None:
    """Writes uint8 [H, W, 1 or 3], whole or not at all."""
    write_bytes(path, png(picture))


def _enlarged(tiles: np.ndarray, tile: int) -> np.ndarray:
    factor = max(1, -(-tile // max(tiles.shape[1:3])))
    return tiles.repeat(factor, axis=1).repeat(factor, axis=2)


def _text(text: str, height: int, width: int) -> np.ndarray:
    from PIL import Image, ImageDraw

    picture = Image.new("L", (width, height), 255)
    ImageDraw.Draw(picture).text((width / 2, height / 2), text, fill=60, anchor="mm", font_size=min(20, height // 2))
    return np.asarray(picture)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
