"""Stage fuse-lora: adds a LoRA to the weights of a model, so that it is quantized with them."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import (
    TensorFile,
    inside,
    read_json,
    sha256_of_file,
    whole_folder,
    write_bytes,
    write_json,
    write_tensors,
)
from dit2deploy.base.progress import note
from dit2deploy.models.links import link_folder
from dit2deploy.models.load import CONFIG, INDEX, SCHEDULER, ModelFolder, linears, open_model

# Names in files of diffusers and PEFT (lora_A, lora_B) and in those that keep kohya's leaves (lora_down, lora_up).
_LEAVES = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(.+)\.alpha")
_PREFIXES = ("transformer.", "base_model.model.", "diffusion_model.")
_METADATA = "lora_adapter_metadata"  # of diffusers
WEIGHTS = "diffusion_pytorch_model.safetensors"
RECORD = "fused_lora.json"
_CURE = "Give the safetensors file that diffusers' save_lora_weights or PEFT writes for this transformer."


@dataclass
class _Pair:
    """Names of one layer's factors in the file: weight += scale * strength * up @ down."""

    down: str = ""  # [r, K]
    up: str = ""  # [N, r]
    alpha: str = ""


@dataclass(frozen=True)
class _Adapter:
    """What an adapter's configuration says of its strength, in the names of PEFT's LoraConfig.

    A layer's alpha is that of the first of `alpha_pattern` (regular expressions) that the end of its name matches, else
    `lora_alpha`, and where nothing is told the rank. Ranks (`rank_pattern`) are those of the factors.
    """

    lora_alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def strength(self, layer: str, rank: int, alpha: float | None = None) -> float:
        """alpha / r, or alpha / sqrt(r) of rsLoRA (https://arxiv.org/abs/2312.03732); `alpha` where the file has one
        for this layer."""
        if alpha is None:
            told = (value for key, value in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({key})", layer))
            alpha = next(told, self.lora_alpha)
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.use_rslora else rank)


def fuse_lora(model: Path, lora: Path, out: Path, *, scale: float = 1.0) -> ModelFolder:
    """Writes the folder `out`: the pipeline of `model`, the weights of its transformer with the LoRA added.

    Of a whole pipeline (a folder with every component that its index names) the index is kept and the files of the
    other components are linked (copied where links cannot be made): prompts need them. Of anything else, `out` is a
    pipeline of the transformer and, where there is one, the scheduler. fused_lora.json tells what was added; a folder
    that holds it is replaced, any other that is not empty is refused.

    W + scale * alpha / r * B A (https://arxiv.org/abs/2106.09685, section 4.1), in float32; alpha is a tensor of the
    file, or what its metadata (diffusers) or the adapter_config.json beside it (PEFT) says, and alpha / r is 1 where
    nothing tells it. Tensors are read and written one at a time. Raises Misuse for a file that is no LoRA of this
    transformer's linear layers (unknown layers, other shapes, DoRA); factors of text encoders are left out with a note.
    """
    source, file = open_model(Path(model)), TensorFile(Path(lora), cure=_CURE)
    pairs, adapter = _pairs(file, linears(source)), _adapter(file)
    others = _other_components(Path(model))
    with whole_folder(Path(out), replaces=lambda folder: (folder / RECORD).is_file()) as folder:
        write_json(folder / RECORD, {"lora_sha256": sha256_of_file(Path(lora)), "scale": scale})
        write_tensors(folder / "transformer" / WEIGHTS, _Fused(source, file, pairs, adapter, scale))
        write_json(folder / "transformer" / CONFIG, source.config)
        if others:
            for component in others:
                link_folder(component, folder / component.name)
            write_bytes(folder / INDEX, (Path(model) / INDEX).read_bytes())
        else:
            _write_alone(source, folder)
    return open_model(Path(out))


def _other_components(model: Path) -> list[Path]:
    """The folders of a whole pipeline beside its transformer; none of a folder that is no pipeline or lacks one."""
    if not (model / INDEX).is_file():
        return []
    # The index names a component by its library and class, and one that is left out on purpose by [null, null].
    index = read_json(model / INDEX).items()
    named = [inside(model, name) for name, kind in index if isinstance(kind, list) and kind[0] is not None]
    return [path for path in named if path.name != "transformer"] if all(path.is_dir() for path in named) else []


def _write_alone(source: ModelFolder, folder: Path) -> None:
    """The index and the scheduler of a pipeline that holds nothing beside them and the transformer."""
    parts: dict[str, object] = {"transformer": ["diffusers", source.class_name]}
    if source.scheduler_config is not None:
        parts["scheduler"] = ["diffusers", source.scheduler_config.get("_class_name", "DDIMScheduler")]
        write_json(folder / SCHEDULER, source.scheduler_config)
    write_json(folder / INDEX, {"_class_name": "DiffusionPipeline", **parts})


class _Fused(Mapping[str, np.ndarray]):
    """The model's tensors, each computed when it is asked for."""

    def __init__(
        self, source: ModelFolder, file: TensorFile, pairs: Mapping[str, _Pair], adapter: _Adapter, scale: float
    ) -> None:
        self._source, self._file, self._pairs = source, file, pairs
        self._adapter, self._scale = adapter, scale

    def __getitem__(self, name: str) -> np.ndarray:
        value = self._source.tensors.read(name)
        layer = name.removesuffix(".weight")
        pair = self._pairs.get(layer) if name.endswith(".weight") else None
        if pair is None:
            return value
        down, up = (self._file.read(factor).astype(np.float32) for factor in (pair.down, pair.up))
        if not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise Misuse(f"{self._file.path}: {pair.down} or its partner holds NaN or inf.", _CURE)
        alpha = float(self._file.read(pair.alpha)) if pair.alpha else None
        strength = self._scale * self._adapter.strength(layer, len(down), alpha)
        fused = value.astype(np.float32) + np.float32(strength) * (up @ down)
        return fused.astype(value.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.tensors)

    def __len__(self) -> int:
        return len(self._source.tensors)


def config_beside(lora: Path) -> Path | None:
    """The configuration that PEFT writes beside its tensors; None of a file that is not PEFT's or stands alone."""
    path = lora.with_name("adapter_config.json")
    return path if lora.name == "adapter_model.safetensors" and path.is_file() else None


def _adapter(file: TensorFile) -> _Adapter:
    """The adapter's configuration: of the metadata that diffusers writes, keys of this transformer only ("transformer."
    or no prefix: those of text encoders stand beside them); or of the file that PEFT writes beside the tensors."""
    beside = config_beside(file.path)
    if _METADATA in file.metadata:
        where = f"{file.path}: its metadata {_METADATA}"
        try:
            told = json.loads(file.metadata[_METADATA])
        except ValueError as error:
            raise Misuse(f"{where} is no JSON: {error}.", _CURE) from error
    elif beside is not None:
        where, told = str(beside), read_json(beside, cure=_CURE)
    else:
        return _Adapter()
    if not isinstance(told, dict):
        raise Misuse(f"{where} is no table of options.", _CURE)
    own = {key.removeprefix("transformer."): value for key, value in told.items()}
    if own.get("use_dora"):
        raise Misuse(f"{where} asks for DoRA, which is not supported.", _CURE)
    try:
        alpha, patterns = own.get("lora_alpha"), own.get("alpha_pattern") or {}
        return _Adapter(
            lora_alpha=None if alpha is None else float(alpha),
            alpha_pattern={re.compile(key).pattern: float(value) for key, value in patterns.items()},
            use_rslora=bool(own.get("use_rslora")),
        )
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise Misuse(f"{where} has a lora_alpha or alpha_pattern that makes no sense: {error}.", _CURE) from error


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
