"""A quantized checkpoint by plain round-to-nearest, for tests of what comes after `quantize`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit2deploy.artefacts.checkpoint import Checkpoint, CheckpointManifest
from dit2deploy.artefacts.policy import AttentionPolicy, LayerPolicy, MonarchGrid, Policy
from dit2deploy.formats import by_name, pack
from dit2deploy.models import Family
from dit2deploy.models.load import linears_of
from dit2deploy.models.places import after_gelu, attentions_of
from dit2deploy.ops.hadamard_quantize import block_size, hadamard
from dit2deploy.quantizers.monarch import dense, project

COMPILE = {
    "recipe": "w1.58a4",
    "samples": 1,
    "steps": 2,
    "runs": 3,
    "seed": 3,
}  # settings of compile(), for a tiny model


def policy_of(
    family: Family,
    module: torch.nn.Module,
    *,
    weight: str = "ternary",
    bits: tuple[int, ...] = (4,),
    bounds: tuple[int, ...] = (1000,),
    low_rank: int = 0,
    monarch: MonarchGrid | None = None,
    group_size: int | None = None,
    clip: str = "absmax",
    grid: str = "mid-tread",
) -> Policy:
    """Blocks as asked for, modulation and embedders int8, final layers as they are."""

    def layer(name: str, k: int) -> LayerPolicy:
        role = family.role(name)
        if role == "final":
            return LayerPolicy(weight="float")
        hadamard = block_size(k)
        if role == "block":
            return LayerPolicy(
                weight=weight,
                activation_bits=bits,
                hadamard=hadamard,
                low_rank=low_rank,
                monarch=monarch,
                group_size=group_size,
                clip=clip,
                grid=grid,
            )
        return LayerPolicy(weight="int8", activation_bits=(8,) * len(bounds), hadamard=hadamard)

    return Policy(
        method="test",
        model=family.class_name,
        timestep_bounds=bounds,
        layers={name: layer(name, k) for name, (_, k) in linears_of(module).items()},
    )


def pack_layer(layer: torch.nn.Linear, policy: LayerPolicy) -> dict[str, np.ndarray]:
    """Tensors of one quantized linear, by the last part of their names."""
    fmt, (n, k) = by_name(policy.weight), layer.weight.shape
    out = {}
    weight = layer.weight.detach()
    if policy.low_rank:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        up, down = u[:, : policy.low_rank] * s[: policy.low_rank], v[: policy.low_rank]
        out = {"down": down.numpy().astype(np.float16), "up": up.numpy().astype(np.float16)}
        weight = weight - up @ down
    if policy.monarch:
        down, up = project(weight, policy.monarch)
        out |= {"monarch_down": down.numpy(), "monarch_up": up.numpy()}
        weight = weight - dense(down, up)
    groups = hadamard(weight, block=policy.hadamard).reshape(n, k // (policy.group_size or k), -1)
    scale = groups.abs().mean(-1) * 2 if fmt.name == "ternary" else groups.abs().amax(-1) / fmt.high
    codes = (groups / scale.unsqueeze(-1)).round().clamp(fmt.low, fmt.high).reshape(n, k)
    bias = layer.bias.detach() if layer.bias is not None else torch.zeros(n)
    return {
        "weight": pack(codes.numpy().astype(np.int32), fmt),
        "weight_scale": scale.numpy(),
        "bias": bias.numpy().copy(),
        "qmax": np.array(policy.largest_codes, np.float32),
        **({"regions": _gelu_regions(policy)} if policy.regions == "gelu" else {}),
        **out,
    }


def _gelu_regions(policy: LayerPolicy) -> np.ndarray:
    return np.array([(0, 0.17 / 2 ** (b - 1), 4 / 2 ** (b - 1)) for b in policy.activation_bits], np.float32)


def with_regions(policy: Policy, module: torch.nn.Module, *, bits: tuple[int, ...]) -> Policy:
    """The policy with int8 weights, inputs of GELU layers by two regions, and every attention quantized."""
    plain = LayerPolicy(weight="int8", activation_bits=bits)
    regions = plain.model_copy(update={"regions": "gelu"})
    layers = dict.fromkeys(after_gelu(module), regions)
    attention = AttentionPolicy(bits=bits, probability_bits=bits)
    return policy.model_copy(
        update={
            "layers": {**policy.layers, **layers},
            "attentions": dict.fromkeys(attentions_of(module), attention),
        }
    )


def with_equal_embedders(module: torch.nn.Module) -> torch.nn.Module:
    """The DiT with the first block's embedders in every block: so diffusers has converted checkpoints."""
    first = module.transformer_blocks[0].norm1.emb.state_dict()
    for block in module.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return module


def pack_checkpoint(
    folder: Path, module: torch.nn.Module, policy: Policy, *, half: bool = True, scheduler: dict | None = None
) -> Checkpoint:
    """Writes and loads the checkpoint of a module; `half` stores what is not quantized as float16."""
    layers = {name for name, layer in policy.layers.items() if layer.is_quantized}
    tensors = {}
    for name, value in module.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer not in layers:
            tensors[name] = value.numpy().astype(np.float16 if half else np.float32)
        elif leaf == "weight":
            packed = pack_layer(module.get_submodule(layer), policy.layers[layer])
            tensors |= {f"{layer}.{leaf}": part for leaf, part in packed.items()}
    for name, attention in policy.attentions.items():
        for leaf, bits in (("qmax", attention.bits), ("probability_qmax", attention.probability_bits)):
            tensors[f"{name}.processor.{leaf}"] = np.array([2 ** (b - 1) - 1 for b in bits], np.float32)
        regions = [(1 / 4, 1 / 4 / 2 ** (b - 1), 1 / 2 ** (b - 1)) for b in attention.probability_bits]
        tensors[f"{name}.processor.regions"] = np.array(regions, np.float32)
    manifest = CheckpointManifest(
        model=policy.model,
        model_sha256="0" * 64,
        model_path="",
        policy_sha256=policy.sha256,
        calibration_sha256="0" * 64,
        seed=0,
    )
    config = {**module.config, "_class_name": policy.model}
    return Checkpoint.save(folder, manifest, tensors=tensors, policy=policy, config=config, scheduler_config=scheduler)


def tiny_module(family: Family, *, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """The family's tiny transformer, its config changed, with random weights of which no part is zero."""
    import diffusers

    torch.manual_seed(seed)
    module = getattr(diffusers, family.class_name)(**{**family.tiny, **changes}).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        if parameter.abs().max() == 0:
            parameter.normal_(std=0.1)
    family.adapt(module)
    return module
