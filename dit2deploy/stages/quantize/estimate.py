"""What quantize will take: `dit2deploy quantize --dry-run`."""

import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.estimate import Estimate, read_rate
from dit2deploy.base.machine import anonymous_bytes
from dit2deploy.base.memory import SLACK
from dit2deploy.evaluate.size import stored_bytes
from dit2deploy.models.cost import cost_of_call, product_rate
from dit2deploy.models.load import linears_of, open_model, skeleton
from dit2deploy.models.stream import bytes_of
from dit2deploy.quantizers.linear import quantize_linear
from dit2deploy.stages.quantize.plan import make_plan

ROWS, COLUMNS = 256, 1024  # of a probe, at most


def estimate(
    model: Path,
    policy: Policy,
    call: Mapping[str, np.ndarray],
    *,
    calls: int,
    max_memory: int | None = None,
    seed: int = 0,
) -> Estimate:
    """Of `quantize` of the model over `calls` calls like `call`; raises Misuse as it does, and writes nothing.

    Reconstruction (rounding "adaround"), Fisher scores and the search of regions are not in the time.
    """
    source = open_model(Path(model))
    empty = skeleton(source)
    shapes = linears_of(empty)
    policy.check_covers(source.class_name, shapes)
    layers = {name: policy.layers[name] for name in shapes if policy.layers[name].is_quantized}
    needy = [name for name, layer in layers.items() if layer.needs_moments]
    smooth = any(layer.smoothing or layer.permutation != "none" for layer in layers.values())
    walked = {name: torch.from_numpy(value) for name, value in call.items()} if needy or smooth else None
    plan = make_plan(empty, shapes, policy, layers, call=walked, max_memory=max_memory)

    rate = read_rate(source.tensors.files[0].path)
    stored = sum(file.path.stat().st_size for file in source.tensors.files)
    seconds = 2 * stored / rate  # their hash, and each weight once
    for name, layer in layers.items():
        n, k = shapes[name]
        by_weight, by_moment = _probe(layer, min(n, ROWS), k if k <= COLUMNS else _columns(layer), seed)
        seconds += by_weight * n * k + by_moment * (n * k**2 + k**3)
    tape = 0
    if walked is not None:
        cost, product = cost_of_call(empty, walked), product_rate()
        flops = cost.flops + sum(2 * cost.rows.get(name, 0) * shapes[name][1] ** 2 for name in needy)
        seconds += calls * flops / product + stored / rate
        tape = calls * cost.widest
    packed = sum(stored_bytes(layer, shapes[name]) for name, layer in layers.items())
    rest = sum(source.tensors.nbytes(name) for name in source.tensors if name.rpartition(".")[0] not in layers)
    keep = bytes_of(empty) if plan.keep is None else min(plan.keep, bytes_of(empty))
    memory = anonymous_bytes() + SLACK + plan.peak + (keep if walked is not None and plan.keep is not None else 0)
    return Estimate("quantize", seconds, memory, 2 * packed + rest + tape)


@functools.cache
def _probe(layer: LayerPolicy, n: int, k: int, seed: int) -> tuple[float, float]:
    """Seconds a weight, and what second moments add a (weight and column): GPTQ's loop and its factor."""
    layer = layer.model_copy(update={"low_rank": min(layer.low_rank, n, k)})
    if layer.monarch and layer.monarch.fault(n, k):
        layer = layer.model_copy(update={"monarch": None})
    weight = np.random.default_rng(seed).standard_normal((n, k), np.float32)

    def timed(layer: LayerPolicy, hessian: torch.Tensor | None) -> float:
        begun = time.perf_counter()
        quantize_linear(weight, None, layer, hessian=hessian, seed=seed)
        return time.perf_counter() - begun

    timed(layer.without_moments, None)  # the first call makes tables and wakes threads
    plain = timed(layer.without_moments, None)
    added = timed(layer, torch.eye(k)) - plain if layer.needs_moments else 0.0
    return plain / (n * k), max(0.0, added) / (n * k**2 + k**3)


def _columns(layer: LayerPolicy) -> int:
    """About COLUMNS columns that the layer's rotation and groups divide."""
    unit = math.lcm(layer.hadamard, layer.group_size or 1)
    return unit * max(1, COLUMNS // unit)
