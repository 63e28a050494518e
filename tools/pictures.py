"""The two sets of pictures that the models here learn to draw: handwritten digits, and coloured shapes in textures."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HELD_OUT = 500


class Pictures(NamedTuple):
    """Pictures float32 [N, C, size, size] in -1..1 with labels int64 [N] in 0 .. len(names) - 1.

    `train(count, generator)` draws at random what models learn from; `held_out(count, seed)` what they have not seen.
    """

    names: tuple[str, ...]  # of the classes
    channels: int
    size: int
    train: Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
    reader: Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]  # as `train`, without what is held out
    held_out: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    model: dict[str, int]  # arguments of DiTTransformer2DModel beside those that follow from the pictures


# Digits: scikit-learn's 8 x 8 digits, drawn 12 x 12 on 16 x 16 pixels.

DRAWN = 12  # so that at least one pixel of margin stays at each side
DIGIT_SIZE = 16
SHIFT = 1


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 digits as float32 [N, 1, 12, 12] in -1 (paper) .. 1 (ink), and their labels int64 [N]."""
    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32))[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=(DRAWN, DRAWN), mode="bicubic")
    # The source counts ink in blocks of 4 x 4: the gain gives strokes a core of full ink and the paper none.
    images = ((images - 0.5) * 1.3 + 0.5).clamp(0, 1)
    return images * 2 - 1, torch.from_numpy(data.target).long()


def place(images: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Pads 12 x 12 digits to [N, 1, 16, 16]; shifts int64 [N, 2] in -1..1 move them off the centre, never round it."""
    margin = (DIGIT_SIZE - DRAWN) // 2
    padded = images.new_full((len(images), 1, DIGIT_SIZE, DIGIT_SIZE), -1.0)
    for dy in range(-SHIFT, SHIFT + 1):
        for dx in range(-SHIFT, SHIFT + 1):
            rows = (shifts[:, 0] == dy) & (shifts[:, 1] == dx)
            y, x = margin + dy, margin + dx
            padded[rows, :, y : y + DRAWN, x : x + DRAWN] = images[rows]
    return padded


def split_digits() -> tuple[np.ndarray, np.ndarray]:
    """Indices of the digits that the reader is trained on, and of the 500 that are held out (stratified by class)."""
    _, labels = digits()
    return train_test_split(np.arange(len(labels)), test_size=HELD_OUT, random_state=0, stratify=labels)


def _digits_of(indices: np.ndarray | None, count: int, generator: torch.Generator):
    images, labels = digits()
    indices = np.arange(len(images)) if indices is None else indices
    chosen = torch.from_numpy(indices)[torch.randint(len(indices), (count,), generator=generator)]
    shifts = torch.randint(-SHIFT, SHIFT + 1, (count, 2), generator=generator)
    return place(images[chosen], shifts), labels[chosen]


def _held_out_digits(count: int, seed: int):
    return _digits_of(split_digits()[1], count, torch.Generator().manual_seed(seed))


# Shapes: procedural, 8 outlines x 3 textures in any colour on any colour, moved, turned and scaled at random.

OUTLINES = ("disc", "square", "triangle", "cross", "star", "ring", "crescent", "half")
TEXTURES = ("plain", "striped", "checked")
SHAPE_SIZE = 32
TURN = 0.5  # radians to either side
SMALLEST, LARGEST = 0.26, 0.40  # radius, share of the picture


def outline(kind: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Signed distance (about; negative inside) of points (u, v) [N, H, W] from outline kind [N] of radius 1."""
    r = torch.sqrt(u * u + v * v)
    angle = torch.atan2(u, -v)
    bar, pole = torch.maximum(u.abs() - 0.95, v.abs() - 0.34), torch.maximum(u.abs() - 0.34, v.abs() - 0.95)
    bite = 0.78 - torch.sqrt((u - 0.5) ** 2 + v * v)
    distances = torch.stack(
        [
            r - 0.9,
            torch.maximum(u.abs(), v.abs()) - 0.8,
            torch.maximum(v - 0.5, 0.866 * u.abs() - 0.5 * v - 0.5),
            torch.minimum(bar, pole),
            r - (0.68 + 0.30 * torch.cos(5 * angle)),
            (r - 0.68).abs() - 0.24,
            torch.maximum(r - 0.95, bite),
            torch.maximum(r - 0.95, -v - 0.1),
        ]
    )
    return distances.gather(0, kind.view(1, -1, 1, 1).expand(1, *r.shape))[0]


def texture(kind: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Share 0..1 of the second colour at points (u, v) [N, H, W] of texture kind [N]."""
    stripes = torch.sigmoid(6 * torch.sin(7.5 * v))
    checks = torch.sigmoid(8 * torch.sin(5.5 * u) * torch.sin(5.5 * v))
    shares = torch.stack([torch.zeros_like(u), stripes, checks])
    return shares.gather(0, kind.view(1, -1, 1, 1).expand(1, *u.shape))[0]


def colours(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """RGB [N, 3] in 0..1 from hue, saturation, value [N] in 0..1."""
    corner = (hue.unsqueeze(1) * 6 + torch.tensor([5.0, 3.0, 1.0])) % 6
    depth = torch.minimum(corner, 4 - corner).clamp(0, 1)
    return value.unsqueeze(1) * (1 - saturation.unsqueeze(1) * depth)


def draw_shapes(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` random shapes float32 [N, 3, 32, 32] in -1..1, and their classes: outline * 3 + texture."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    labels = torch.randint(len(SHAPES.names), (count,), generator=generator)
    radius, turn = uniform(SMALLEST, LARGEST), uniform(-TURN, TURN)
    reach = 0.46 - radius.clamp(max=0.42)
    centre = [0.5 + reach * uniform(-1, 1) for _ in range(2)]
    grid = (torch.arange(SHAPE_SIZE) + 0.5) / SHAPE_SIZE
    y = (grid.view(1, -1, 1) - centre[0].view(-1, 1, 1)) / radius.view(-1, 1, 1)
    x = (grid.view(1, 1, -1) - centre[1].view(-1, 1, 1)) / radius.view(-1, 1, 1)
    cos, sin = turn.cos().view(-1, 1, 1), turn.sin().view(-1, 1, 1)
    u, v = cos * x + sin * y, cos * y - sin * x
    pixel = 1 / (SHAPE_SIZE * radius.view(-1, 1, 1))
    inside = torch.sigmoid(-3 * outline(labels // len(TEXTURES), u, v) / pixel)
    second = texture(labels % len(TEXTURES), u, v)

    hue = uniform(0, 1)
    paint = colours(hue, uniform(0.6, 1), uniform(0.75, 1))
    other = colours((hue + uniform(-0.1, 0.1)) % 1, uniform(0.3, 0.9), uniform(0.2, 0.35))
    ground = colours((hue + uniform(0.35, 0.65)) % 1, uniform(0.1, 0.5), uniform(0.7, 1))
    light = uniform(-0.25, 0.25).view(-1, 1, 1) * (grid.view(1, -1, 1) - 0.5) * 2

    def spread(colour: torch.Tensor) -> torch.Tensor:
        return colour.view(count, 3, 1, 1)

    body = torch.lerp(spread(paint), spread(other), second.unsqueeze(1))
    image = torch.lerp(spread(ground) * (1 + light).unsqueeze(1), body, inside.unsqueeze(1))
    return image.clamp(0, 1) * 2 - 1, labels


DIGITS = Pictures(
    names=tuple(str(digit) for digit in range(10)),
    channels=1,
    size=DIGIT_SIZE,
    train=lambda count, generator: _digits_of(None, count, generator),
    reader=lambda count, generator: _digits_of(split_digits()[0], count, generator),
    held_out=_held_out_digits,
    model={"num_attention_heads": 6, "attention_head_dim": 32, "num_layers": 6, "patch_size": 2},
)
SHAPES = Pictures(
    names=tuple(f"{texture} {outline}" for outline in OUTLINES for texture in TEXTURES),
    channels=3,
    size=SHAPE_SIZE,
    train=draw_shapes,
    reader=draw_shapes,
    held_out=lambda count, seed: draw_shapes(count, torch.Generator().manual_seed(10**6 + seed)),
    model={"num_attention_heads": 8, "attention_head_dim": 32, "num_layers": 7, "patch_size": 4},
)
PICTURES = {"digits": DIGITS, "shapes": SHAPES}
