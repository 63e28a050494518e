"""Writes a transformer of true geometry with random weights, shard by shard: what is too large to fetch.

    python tools/random_model.py flux.1-dev /tmp/flux                   12 B parameters, 24 GB
    python tools/random_model.py flux.1-dev /tmp/flux --layers 2,4      of true width, 2 double and 4 single blocks
    python tools/random_model.py flux.1-dev /tmp/packed --recipe w1.58a4    its checkpoint, as if quantized: 2.5 GB

Weights are bfloat16. Linears are N(0, 1 / K), so that activations stay finite, cut from one pool of draws at random
places; norms are ones, biases zeros. A checkpoint holds random words: right in all but what it computes. Memory: one
shard, or one tensor.
"""

import argparse
import functools
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensor

from dit2deploy.artefacts.checkpoint import Checkpoint, CheckpointManifest
from dit2deploy.base.files import write_json
from dit2deploy.models.load import CONFIG, build, fake_parameters, known_family, linears_of
from dit2deploy.nn.convert import empty_quantized
from dit2deploy.stages.search.problem import Problem
from dit2deploy.stages.search.uniform import RECIPES as UNIFORM

SHARD = 512 << 20  # bytes, unless one tensor is larger
STEM = "diffusion_pytorch_model"

# Name -> config of the diffusers class, and the fields that count its blocks. All else is the class's default.
GEOMETRIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dit-xl-2": (
        {"_class_name": "DiTTransformer2DModel", "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
        | {"in_channels": 4, "out_channels": 8, "sample_size": 32, "num_embeds_ada_norm": 1000},
        ("num_layers",),
    ),
    "flux.1-dev": (
        {"_class_name": "FluxTransformer2DModel", "num_layers": 19, "num_single_layers": 38, "in_channels": 64}
        | {"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096}
        | {"pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56]},
        ("num_layers", "num_single_layers"),
    ),
    "wan2.1-t2v-14b": (
        {"_class_name": "WanTransformer3DModel", "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
        | {"attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256},
        ("num_layers",),
    ),
}


def write_random_model(geometry: str, out: Path, *, layers: tuple[int, ...] | None = None, seed: int = 0) -> int:
    """Writes the folder of a transformer, for a class-conditional one of a pipeline with a scheduler; parameters."""
    config, counts = GEOMETRIES[geometry]
    if layers is not None:
        config = config | dict(zip(counts, layers, strict=True))
    if "num_embeds_ada_norm" in config:
        write_json(out / "model_index.json", {"_class_name": "DiTPipeline"})
        write_json(out / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", "clip_sample": False})
        out = out / "transformer"
    write_json(out / CONFIG, config)
    with fake_parameters():
        module = build(config, out / CONFIG)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shards = list(_shards(shapes))
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _random(name, shapes[name], seed) for name in names}, out / file)
        places |= dict.fromkeys(names, file)
        print(f"{file}: {sum(map(len, shards[:number]))} of {len(shapes)} tensors", flush=True)
    total = sum(map(math.prod, shapes.values()))
    write_json(out / f"{STEM}.safetensors.index.json", {"metadata": {"total_size": 2 * total}, "weight_map": places})
    return total


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Runs of names that fill a shard."""
    run, size = [], 0
    for name, shape in shapes.items():
        if run and size + 2 * math.prod(shape) > SHARD:
            yield run
            run, size = [], 0
        run.append(name)
        size += 2 * math.prod(shape)
    yield run


def _random(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if len(shape) < 2:
        return (torch.ones if name.endswith("weight") else torch.zeros)(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed + _number(name))
    pool, scale = _pool(), 1 / math.sqrt(math.prod(shape[1:]))
    value = torch.empty(math.prod(shape), dtype=torch.bfloat16)
    for part in value.split(len(pool) // 2):
        at = int(torch.randint(len(pool) - len(part) + 1, (1,), generator=generator))
        part.copy_(pool[at : at + len(part)] * scale)
    return value.reshape(shape)


def _number(name: str) -> int:
    """Another one for every tensor; the embedders of DiT's blocks are equal, as in the checkpoints that it has."""
    return zlib.crc32(re.sub(r"\.\d+\.norm1\.emb\.", ".norm1.emb.", name).encode())


@functools.cache
def _pool() -> torch.Tensor:
    return torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))


def write_random_checkpoint(geometry: str, out: Path, recipe: str, *, layers: tuple[int, ...] | None = None) -> int:
    """Writes the folder of a quantized checkpoint; the number of bytes of its tensors."""
    config, counts = GEOMETRIES[geometry]
    if layers is not None:
        config = config | dict(zip(counts, layers, strict=True))
    with fake_parameters():
        shapes = linears_of(build(config, out / CONFIG))
    family = known_family(config["_class_name"], out / CONFIG)
    problem = Problem(
        model=config["_class_name"],
        linears=shapes,
        roles={name: family.role(name) for name in shapes},
        training_steps=1000,
    )
    policy = next(entry for entry in UNIFORM if entry.name == recipe).search(problem)
    manifest = CheckpointManifest(
        model=config["_class_name"],
        model_sha256="random",
        model_path="random",
        policy_sha256=policy.sha256,
        calibration_sha256="random",
        seed=0,
    )
    tensors = _RandomTensors(empty_quantized(config, policy).state_dict())
    made = Checkpoint.save(out, manifest, tensors=tensors, policy=policy, config=config, scheduler_config=None)
    return sum(map(made.tensors.nbytes, made.tensors))


class _RandomTensors(Mapping[str, np.ndarray]):
    """Values for the tensors of a quantized module, made when they are asked for."""

    def __init__(self, wanted: Mapping[str, torch.Tensor]) -> None:
        self._wanted = wanted

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._wanted[name]
        if not isinstance(tensor, FakeTensor):
            return tensor.numpy()
        if tensor.dtype == torch.int32:  # 243 values of a byte that five trits can have
            size = 4 * math.prod(tensor.shape)
            octets = np.resize(np.random.default_rng(_number(name)).integers(0, 243, 1 << 20, np.uint8), size)
            return octets.view(np.int32).reshape(tuple(tensor.shape))
        return _random(name, tuple(tensor.shape), 0).to(tensor.dtype).numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=lambda text: tuple(map(int, text.split(","))), help="e.g. 2,4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", help="write the quantized checkpoint, by this uniform recipe")
    options = parser.parse_args()
    if options.recipe:
        size = write_random_checkpoint(options.geometry, options.out, options.recipe, layers=options.layers)
        print(f"{options.out}: {size:,} bytes")
    else:
        count = write_random_model(options.geometry, options.out, layers=options.layers, seed=options.seed)
        print(f"{options.out}: {count:,} parameters")
