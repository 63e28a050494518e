"""What every search is given: the layers of one model, their sizes and their roles."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One model, as far as a policy depends on it."""

    model: str  # class name of the transformer
    linears: Mapping[str, tuple[int, int]]  # name -> (N, K), in the model's order
    roles: Mapping[str, str]  # name -> role, see models.family
    training_steps: int  # timesteps are 0 .. training_steps - 1
    seed: int = 0
    smoothable: frozenset[str] = frozenset()  # layers that the family has a place for, see models/folds.py
    attentions: tuple[str, ...] = ()  # whose products can be quantized, see models.places
    after_gelu: tuple[str, ...] = ()  # linears whose input is a GELU
