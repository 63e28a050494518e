"""Stage fuse-lora: adds a LoRA to the weights of a model, so that it is quantized with them."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import TensorFile, whole_folder, write_json, write_tensors
from dit2deploy.base.progress import note
from dit2deploy.models.load import CONFIG, INDEX, SCHEDULER, ModelFolder, linears, open_model

# Names in files of diffusers and PEFT (lora_A, lora_B) and in those that keep kohya's leaves (lora_down, lora_up).
_LEAVES = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(.+)\.alpha")
_PREFIXES = ("transformer.", "base_model.model.", "diffusion_model.")
WEIGHTS = "diffusion_pytorch_model.safetensors"
_CURE = "Give the safetensors file that diffusers' save_lora_weights or PEFT writes for this transformer."


@dataclass
class _Pair:
    """Names of one layer's factors in the file: weight += scale * alpha / r * up @ down."""

    down: str = ""  # [r, K]
    up: str = ""  # [N, r]
    alpha: str = ""


def fuse_lora(model: Path, lora: Path, out: Path, *, scale: float = 1.0) -> ModelFolder:
    """Writes the folder `out`: a pipeline of the scheduler and the transformer of `model`, weights with the LoRA added.

    W + scale * alpha / r * B A (https://arxiv.org/abs/2106.09685, section 4.1), in float32; alpha / r is 1 where the
    file tells no alpha. Tensors are read and written one at a time. Raises Misuse for a file that is no LoRA of this
    transformer's linear layers (unknown layers, other shapes, DoRA); factors of text encoders are left out with a note.
    """
    source, file = open_model(Path(model)), TensorFile(Path(lora), cure=_CURE)
    pairs = _pairs(file, linears(source))
    parts: dict[str, object] = {"transformer": ["diffusers", source.class_name]}
    with whole_folder(Path(out)) as folder:
        write_tensors(folder / "transformer" / WEIGHTS, _Fused(source, file, pairs, scale))
        write_json(folder / "transformer" / CONFIG, source.config)
        if source.scheduler_config is not None:
            parts["scheduler"] = ["diffusers", source.scheduler_config.get("_class_name", "DDIMScheduler")]
            write_json(folder / SCHEDULER, source.scheduler_config)
        write_json(folder / INDEX, {"_class_name": "DiffusionPipeline", **parts})
    return open_model(Path(out))


class _Fused(Mapping[str, np.ndarray]):
    """The model's tensors, each computed when it is asked for."""

    def __init__(self, source: ModelFolder, file: TensorFile, pairs: Mapping[str, _Pair], scale: float) -> None:
        self._source, self._file, self._pairs, self._scale = source, file, pairs, scale

    def __getitem__(self, name: str) -> np.ndarray:
        value = self._source.tensors.read(name)
        pair = self._pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if pair is None:
            return value
        down, up = (self._file.read(factor).astype(np.float32) for factor in (pair.down, pair.up))
        if not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise Misuse(f"{self._file.path}: {pair.down} or its partner holds NaN or inf.", _CURE)
        alpha = float(self._file.read(pair.alpha)) if pair.alpha else _alpha(self._file, len(down))
        fused = value.astype(np.float32) + np.float32(self._scale * alpha / len(down)) * (up @ down)
        return fused.astype(value.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.tensors)

    def __len__(self) -> int:
        return len(self._source.tensors)


def _alpha(file: TensorFile, rank: int) -> float:
    """lora_alpha of the adapter's metadata as diffusers writes it; the rank where there is none."""
    told = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    return float(next((value for key, value in told.items() if key.split(".")[-1] == "lora_alpha"), rank))


def _pairs(file: TensorFile, shapes: Mapping[str, tuple[int, int]]) -> dict[str, _Pair]:
    """Factors by layer; Misuse where the file is not a LoRA of these layers."""
    found: dict[str, _Pair] = {}
    elsewhere = 0
    for name in file:
        if name.startswith(("text_encoder", "lora_te")):
            elsewhere += 1
            continue
        match = _LEAVES.fullmatch(name)
        if match is None:
            raise Misuse(f"{file.path}: {name} is no factor of a LoRA (DoRA and LoHa are not supported).", _CURE)
        layer = match[1] or match[3]
        for prefix in _PREFIXES:
            layer = layer.removeprefix(prefix)
        if layer not in shapes:
            raise Misuse(f"{file.path}: {name} belongs to no linear layer of this transformer.", _CURE)
        pair = found.setdefault(layer, _Pair())
        if match[3]:
            pair.alpha = name
        elif match[2] in ("lora_A", "lora_down"):
            pair.down = name
        else:
            pair.up = name
    if not found:
        raise Misuse(f"{file.path}: holds no LoRA of a transformer.", _CURE)
    for layer, pair in found.items():
        if not pair.down or not pair.up:
            raise Misuse(f"{file.path}: {layer} lacks one of its two factors.", _CURE)
        (n, k), down, up = shapes[layer], file.shape(pair.down), file.shape(pair.up)
        if len(down) != 2 or len(up) != 2 or (up[0], down[1], up[1]) != (n, k, down[0]):
            raise Misuse(f"{file.path}: {layer}: {list(up)} x {list(down)} is not its weight's {[n, k]}.", _CURE)
    if elsewhere:
        note(f"fuse-lora: {elsewhere} tensors of text encoders are left out")
    return found
