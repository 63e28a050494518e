"""What a policy makes of a layer, in words: for inspect, the report and the card."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dit2deploy.artefacts.policy import AttentionPolicy, LayerPolicy, Policy
from dit2deploy.formats import by_name

_ROUNDING = {"nearest": "", "gptq": "GPTQ", "adaround": "AdaRound"}


class Words(NamedTuple):
    weight: str
    activation: str
    rotation: str = "none"
    branch: str = "none"

    @property
    def line(self) -> str:
        """In one line, without what there is none of."""
        if self.weight == self.activation:
            return "full precision"
        told = [f"weights {self.weight}", f"activations {self.activation}"]
        told += [part for part in (self.rotation, self.branch) if part != "none"]
        return "; ".join(told)


def of_layer(layer: LayerPolicy) -> Words:
    """All that the policy says of a linear layer and that a user may ask of it."""
    if not layer.is_quantized:
        return Words("float", "float")
    bits = layer.log_bits or layer.weight_bits or by_name(layer.weight).bits
    weight = [f"{bits:g} bit", f"groups of {layer.group_size}" if layer.group_size else "per channel"]
    weight += ["Twin-Log levels"] if layer.log_bits else []
    weight += [_ROUNDING[layer.rounding]] if _ROUNDING[layer.rounding] else []
    weight += ["columns in zigzag order"] if layer.permutation == "zigzag" else []
    activation = [f"{_widths(layer.activation_bits)} bit"]
    if layer.regions == "gelu":
        activation.append("static steps below and above 0 in each timestep group")
    else:
        activation[0] += " per token"
        activation += [layer.clip, layer.grid]
        activation += ["gain given back by the weight scales"] if layer.gain == "clip" else []
    activation += [f"smoothed (alpha {layer.smoothing:g})"] if layer.smoothing else []
    branch = [f"rank {layer.low_rank}"] if layer.low_rank else []
    if layer.monarch:
        branch.append(f"Monarch {layer.monarch.blocks_in} x {layer.monarch.blocks_out} of rank {layer.monarch.rank}")
    return Words(
        f"{layer.weight} ({', '.join(weight)})",
        ", ".join(activation),
        f"Hadamard, blocks of {layer.hadamard}" if layer.hadamard > 1 else "none",
        ", ".join(branch) or "none",
    )


def of_attention(attention: AttentionPolicy) -> Words:
    """Of an attention whose two products are those of integers."""
    probabilities = f"softmax {_widths(attention.probability_bits)} bit in two regions of each timestep group"
    return Words("none: Q K^T and P V as integers", f"Q, K, V {_widths(attention.bits)} bit, {probabilities}")


def of_policy(policy: Policy) -> Iterator[tuple[str, str, Words]]:
    """("linear layer" or "attention", name, words) of each thing that the policy names."""
    yield from (("linear layer", name, of_layer(layer)) for name, layer in policy.layers.items())
    yield from (("attention", name, of_attention(attention)) for name, attention in policy.attentions.items())


def counted(policy: Policy) -> list[tuple[str, Words, int]]:
    """(kind, words, how many are treated so), the most first; the kind in the plural where they are several."""
    counts = Counter((kind, words) for kind, _, words in of_policy(policy))
    return [(kind if count == 1 else f"{kind}s", words, count) for (kind, words), count in counts.most_common()]


def _widths(bits: Sequence[int]) -> str:
    """One number where all timestep groups have it, else one a group."""
    return "/".join(map(str, bits if len(set(bits)) > 1 else bits[:1]))
