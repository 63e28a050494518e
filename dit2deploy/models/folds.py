"""Places where a layer's input can be divided channel by channel in the linears before it, exactly: for smoothing.

A family names them for its blocks by the two ways that transformers with adaLN have:
1. `by_modulation`: x = LN(h) (1 + scale) + shift, and the modulation linear gives scale and shift. x / c has shift / c
   and 1 + scale' = (1 + scale) / c, so scale' = scale / c + (1 / c - 1): rows of weight and bias times 1 / c, and
   1 / c - 1 on the bias of scale, which takes up what is not linear (PTQ4DiT's identity term, methods.md 6.7).
2. `by_values`: the output projection of attention reads sums of rows of V over tokens: rows of the value projection
   times 1 / c. Where attention is joint, both streams' values are summed, and all that reads the sums shares c.
No place: what reads GELU, a normalisation with weights of its own, a residual stream, or a modulation that all blocks
share (PixArt, Wan).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Linears = Mapping[str, tuple[int, int]]  # name -> (N, K)


@dataclass(frozen=True)
class Producer:
    """A linear before the readers: its rows that are divided, and those of them that give a scale used as 1 + scale."""

    layer: str
    rows: slice
    scale_rows: slice | None = None


@dataclass(frozen=True)
class Fold:
    """Layers whose inputs are divided by one c, and the linears that take the division."""

    readers: tuple[str, ...]
    producers: tuple[Producer, ...]


def by_modulation(
    linears: Linears, norm: str, readers: Sequence[str], *, parts: int, shift: int, scale: int
) -> list[Fold]:
    """Case 1: the output of the linear `norm` is `parts` vectors, and those numbered `shift` and `scale`, neighbours,
    modulate what `readers` read. None where the model lacks one of the layers, or where `norm` is not of that size."""
    if norm not in linears or any(reader not in linears for reader in readers):
        return []
    k = linears[readers[0]][1]
    if linears[norm][0] != parts * k:
        return []
    first = min(shift, scale)
    producer = Producer(norm, slice(first * k, (first + 2) * k), slice(scale * k, (scale + 1) * k))
    return [Fold(tuple(readers), (producer,))]


def by_values(linears: Linears, values: Sequence[str], readers: Sequence[str]) -> list[Fold]:
    """Case 2: `readers`, of which a block may lack some, read sums of the rows that the linears `values` give."""
    there = tuple(reader for reader in readers if reader in linears)
    if not there or any(value not in linears for value in values):
        return []
    return [Fold(there, tuple(Producer(value, slice(0, linears[value][0])) for value in values))]


def blocks(linears: Linears, name: str) -> list[str]:
    """Prefixes "NAME.0", "NAME.1", .. of the linears below a list of blocks, in the model's order."""
    depth = name.count(".") + 2
    found = (".".join(layer.split(".")[:depth]) for layer in linears if layer.startswith(f"{name}."))
    return list(dict.fromkeys(found))


def joint_block(linears: Linears, block: str) -> list[Fold]:
    """Of an MM-DiT block of two streams (SD3, FLUX) as diffusers names its layers; dual attention (SD3.5) included."""
    found = []
    for side, attention in (("", ("to_q", "to_k", "to_v")), ("_context", ("add_q_proj", "add_k_proj", "add_v_proj"))):
        norm = f"{block}.norm1{side}.linear"
        readers = [f"{block}.attn.{name}" for name in attention]
        for parts in (6, 9):
            found += by_modulation(linears, norm, readers, parts=parts, shift=0, scale=1)
            found += by_modulation(linears, norm, [f"{block}.ff{side}.net.0.proj"], parts=parts, shift=3, scale=4)
        # The last block of SD3 makes no new text tokens: AdaLayerNormContinuous, scale before shift.
        found += by_modulation(linears, norm, readers, parts=2, shift=1, scale=0)
    second = [f"{block}.attn2.{name}" for name in ("to_q", "to_k", "to_v")]
    found += by_modulation(linears, f"{block}.norm1.linear", second, parts=9, shift=6, scale=7)
    values = [f"{block}.attn.to_v", f"{block}.attn.add_v_proj"]
    found += by_values(linears, values, [f"{block}.attn.to_out.0", f"{block}.attn.to_add_out"])
    found += by_values(linears, [f"{block}.attn2.to_v"], [f"{block}.attn2.to_out.0"])
    return found
