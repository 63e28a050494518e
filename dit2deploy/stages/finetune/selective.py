"""Which layers QuEST trains, and when: temporal ones first, then those of the kinds that quantization hurts most."""

import math
import re
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.models.family import Family
from dit2deploy.nn.train_linear import trainable_linears
from dit2deploy.stages.finetune.examples import Inputs, answer

SHARE = 0.5  # of the attention and post-activation linears: those of largest error
SAMPLES = 32  # of the pool, that errors are measured on; whole calls where an entry is one
CALLS = 4
# Linears of attention, and those that read an activation function.
_SENSITIVE = r".*\b(attn\d?|to_[qkv])\b.*|.*\.net\.2|.*\.proj_out"


def phases(
    student: torch.nn.Module, teacher: torch.nn.Module, family: Family, pool: Mapping[str, np.ndarray], *, calls: bool
) -> list[set[str]]:
    """Names of the layers that equal parts of the training train, one set after the other (QuEST,
    https://arxiv.org/abs/2402.03666): first the layers of time and class embeddings, then linears of attention and
    linears behind an activation function; the others stay frozen.

    The kinds and their order are the paper's and its code's. [inferred] Of the second set, the half whose outputs, on
    calls from `pool`, are farthest from those of the teacher, in noise to signal, with all that is quantized before
    them: their code trains all. (Rows of to_v that smoothing was folded into give other outputs on purpose, which
    counts as error.) The layer-wise loss of their first phase has no part here: both phases learn from the model's
    output. Raises Misuse where no quantized layer is of these kinds.
    """
    names = [name for name, _ in trainable_linears(student)]
    temporal = {name for name in names if family.role(name) in ("modulation", "embedding")}
    others = [name for name in names if name not in temporal and re.fullmatch(_SENSITIVE, name)]
    errors = _errors(student, teacher, others, pool, calls=calls)
    worst = sorted(others, key=lambda name: -errors[name])[: math.ceil(SHARE * len(others))]
    found = [layers for layers in (temporal, set(worst)) if layers]
    if not found:
        raise Misuse(
            "finetune: no quantized layer embeds time, serves attention or reads an activation function.",
            "Train all layers, or the branch.",
        )
    return found


def _errors(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    names: list[str],
    pool: Mapping[str, np.ndarray],
    *,
    calls: bool,
) -> dict[str, float]:
    """|y - y_teacher|^2 / |y_teacher|^2 of each layer's outputs, both networks asked for the same."""
    entries = len(pool["target"])
    chosen = np.linspace(0, entries - 1, min(entries, CALLS if calls else SAMPLES)).round().astype(int)
    inputs = {name: torch.from_numpy(value[chosen]) for name, value in pool.items() if name != "target"}
    asked: list[Inputs] = [inputs]
    if calls:
        asked = [{name: value[index] for name, value in inputs.items()} for index in range(len(chosen))]
    noise, signal = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    exact: dict[str, torch.Tensor] = {}

    def keep(name: str, _module: torch.nn.Module, _arguments: tuple, output: torch.Tensor) -> None:
        exact[name] = output

    def compare(name: str, _module: torch.nn.Module, _arguments: tuple, output: torch.Tensor) -> None:
        noise[name] += float((output - exact[name]).double().square().sum())
        signal[name] += float(exact[name].double().square().sum())

    hooks = [
        network.get_submodule(name).register_forward_hook(partial(hook, name))
        for network, hook in ((teacher, keep), (student, compare))
        for name in names
    ]
    try:
        with torch.no_grad():
            for values in asked:
                for network in (teacher, student):
                    answer(network, values)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: noise[name] / signal[name] if signal[name] else 0.0 for name in names}
