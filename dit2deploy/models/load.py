"""Models as diffusers saves them, opened without trust: JSON and safetensors only, classes from a list of ours."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import TensorFile, read_json, sha256_of_file, sha256_of_json
from dit2deploy.base.progress import note
from dit2deploy.models import FAMILIES, Family, family_of
from dit2deploy.models.stream import fill, place

CONFIG = "config.json"
INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_SECOND = "transformer_2"  # Wan2.2's expert for the low noise
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_LORA = re.compile(r".*\.(lora_[AB]|lora_down|lora_up|base_layer)\..*")
_FUSE = "Fuse it first: `dit2deploy fuse-lora MODEL LORA -o OUT`, or `compile --lora`."
_CURE = "Give the folder of a diffusers pipeline or transformer (config.json and safetensors files); fetch it again."
# What a constructor of diffusers raises on a config that makes no sense.
_CONSTRUCTION = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError)
_CONSTRUCTION += (TypeError, ValueError)


class ModelTensors(Mapping[str, TensorFile]):
    """The tensors of one or many safetensors files by name; each is read when asked for, one at a time."""

    def __init__(self, files: tuple[TensorFile, ...], names: Mapping[str, TensorFile]) -> None:
        self.files = files
        self._names = names

    def __getitem__(self, name: str) -> TensorFile:
        return self._names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._names[name].shape(name)

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype, e.g. "BF16"."""
        return self._names[name].dtype(name)

    def nbytes(self, name: str) -> int:
        """Of the tensor as `read` gives it."""
        return self._names[name].nbytes(name)

    def read(self, name: str) -> np.ndarray:
        """A copy of the tensor; bfloat16 comes back as float32."""
        return self._names[name].read(name)

    @cached_property
    def sha256(self) -> str:
        """Of the one file, or of the shards' names and hashes."""
        if len(self.files) == 1:
            return sha256_of_file(self.files[0].path)
        return sha256_of_json({file.path.name: sha256_of_file(file.path) for file in self.files})


@dataclass(frozen=True)
class ModelFolder:
    """A transformer on disk: nothing is loaded yet. `folder` holds config.json and the weights."""

    folder: Path
    config: dict[str, Any]
    class_name: str
    family: Family
    scheduler_config: dict[str, Any] | None
    tensors: ModelTensors

    @property
    def sha256(self) -> str:
        """Of the weights."""
        return self.tensors.sha256


def open_model(path: Path) -> ModelFolder:
    """Opens the folder of a pipeline (model_index.json, transformer/, scheduler/) or of a transformer.

    Raises Misuse for a folder that is none of these, for a pipeline of two experts, for a quantized model, for weights
    that are missing or truncated, for weights that are pickles, and for an architecture that is not known here.
    """
    path = Path(path)
    if not path.is_dir():
        raise Misuse(f"{path}: no such folder.", _CURE)
    folder, pipeline = path, path.parent
    if (path / INDEX).is_file():
        folder, pipeline = path / "transformer", path
        if not folder.is_dir():
            raise Misuse(f"{path}: this pipeline has no transformer.", "Only diffusion transformers are served.")
        if (path / _SECOND).is_dir():
            raise Misuse(
                f"{path}: this pipeline has two experts, transformer and {_SECOND}; one policy is for one of them.",
                f"Give them one after the other: {folder}, then {path / _SECOND}.",
            )
    if (folder / "quantization_config.json").exists():
        raise Misuse(f"{folder}: is a quantized checkpoint.", "Give the full-precision model that it was made from.")
    if not (folder / CONFIG).exists() and _holds_lora(folder):
        raise Misuse(f"{folder}: holds a LoRA and no whole model.", _FUSE)
    config = read_json(folder / CONFIG, cure=_CURE)
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(class_name, str):
        raise Misuse(f"{folder / CONFIG}: names no class (`_class_name`).", _CURE)
    if config.get("quantization_config"):
        raise Misuse(f"{folder}: is quantized already.", "Give the full-precision model that it was made from.")
    scheduler = pipeline / SCHEDULER if (pipeline / INDEX).is_file() else None
    return ModelFolder(
        folder=folder,
        config=config,
        class_name=class_name,
        family=known_family(class_name, folder / CONFIG),
        scheduler_config=read_json(scheduler) if scheduler and scheduler.is_file() else None,
        tensors=_open_tensors(folder),
    )


def _holds_lora(folder: Path) -> bool:
    return any(_LORA.fullmatch(name) for file in folder.glob("*.safetensors") for name in TensorFile(file))


def known_family(class_name: str, where: Path) -> Family:
    """The family of the class; Misuse for a class that is no transformer of the installed diffusers."""
    family = family_of(class_name)
    if family is None:
        known = ", ".join(family.class_name for family in FAMILIES)
        raise Misuse(
            f"{where}: {class_name!r} is an unknown architecture.",
            f"Described: {known}. Besides: what the installed diffusers has in diffusers.models.transformers.",
        )
    return family


def _open_tensors(folder: Path) -> ModelTensors:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            file = TensorFile(folder / name)
            return ModelTensors((file,), dict.fromkeys(file, file))
        if (folder / f"{name}.index.json").is_file():
            return _open_shards(folder, folder / f"{name}.index.json")
    pickles = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise Misuse(
            f"{folder}: its weights are a pickle ({pickles[0]}), which can execute code and is never loaded.",
            "Save them as safetensors (`save_pretrained` does so).",
        )
    raise Misuse(f"{folder}: has no weights ({_WEIGHTS[0]} or its index).", _CURE)


def _open_shards(folder: Path, index: Path) -> ModelTensors:
    content = read_json(index, cure=_CURE)
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        raise Misuse(f"{index}: has no weight_map.", _CURE)
    for name in weights.values():
        # The hub's cache holds links to files elsewhere: what counts is the name.
        if Path(name).name != name:
            raise Misuse(f"{index}: the file name {name!r} leads out of the folder.", _CURE)
    files = {name: TensorFile(folder / name) for name in dict.fromkeys(weights.values())}
    for tensor, name in weights.items():
        if tensor not in files[name]:
            raise Misuse(f"{folder / name}: lacks the tensor {tensor!r}, which the index promises.", _CURE)
    return ModelTensors(tuple(files.values()), {tensor: files[name] for tensor, name in weights.items()})


@contextlib.contextmanager
def fake_parameters() -> Iterator[FakeTensorMode]:
    """Within, parameters of new modules are fake (no memory, no initialisation); buffers stay real.

    Yields the mode, for fake tensors that are no parameters.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter | None:
        if parameter is None or isinstance(parameter, FakeTensor):
            return None
        with mode:
            return torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)

    hook = register_module_parameter_registration_hook(fake)
    try:
        yield mode
    finally:
        hook.remove()


def build(config: Mapping[str, Any], where: Path) -> torch.nn.Module:
    """The transformer of a config, eval() and float32; Misuse where diffusers cannot build it."""
    class_name = config["_class_name"]
    family = known_family(class_name, where)
    kind = getattr(diffusers, class_name, None)
    if kind is None:
        raise Misuse(f"{where}: the installed diffusers has no {class_name}.", "Install a newer diffusers.")
    arguments = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        module = kind.from_config(arguments).eval()
        family.adapt(module)
        return module
    except _CONSTRUCTION as error:
        raise Misuse(f"{where}: does not describe a {class_name}: {error}.", _CURE) from error


def linears(model: ModelFolder) -> dict[str, tuple[int, int]]:
    """(N, K) of every nn.Linear by module name, in order of registration. Loads no weights."""
    return linears_of(skeleton(model))


def skeleton(model: ModelFolder) -> torch.nn.Module:
    """The transformer with fake weights: its modules and shapes. Loads no weights."""
    with fake_parameters():
        return build(model.config, model.folder / CONFIG)


def linears_of(module: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(N, K) of every nn.Linear of a module by name, in order of registration."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }


def load_transformer(path: Path, *, keep: int | None = None) -> tuple[torch.nn.Module, Family]:
    """The transformer of a folder, eval() and float32, and its family.

    With `keep`, about that many bytes of its weights are in memory, and the other layers read theirs at each call
    (models/stream.py): such a network computes the same, but cannot be trained. Raises Misuse as `open_model` does,
    and where weights and config do not fit.
    """
    model = open_model(path)
    for assumption in model.family.assumptions:
        note(assumption)
    with fake_parameters():
        module = build(model.config, model.folder / CONFIG)
    check_fits(module, model)
    fill(module, lambda name: torch.from_numpy(model.tensors.read(name)).float(), keep=keep)
    return module, model.family


def check_fits(module: torch.nn.Module, model: ModelFolder) -> None:
    """Misuse unless the folder's tensors are those of the module, by name and shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, shape in expected.items():
        if name not in model.tensors:
            raise Misuse(f"{model.folder}: the weights lack {name}, which the config asks for.", _CURE)
        if model.tensors.shape(name) != shape:
            found = list(model.tensors.shape(name))
            raise Misuse(f"{model.folder}: {name} is {found}, the config asks for {list(shape)}.", _CURE)
        if model.tensors.dtype(name) not in _FLOATS:
            raise Misuse(
                f"{model.folder}: {name} holds {model.tensors.dtype(name)}, not floating-point weights.",
                f"Give the full-precision model ({', '.join(_FLOATS)}), not one that is quantized already.",
            )
    # Tables that older versions of diffusers saved, and what a class itself says may be left over.
    ignored = {name for name, _ in module.named_buffers()}
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    for name in model.tensors:
        if name in expected or name in ignored or any(re.search(pattern, name) for pattern in patterns):
            continue
        if _LORA.fullmatch(name):
            raise Misuse(f"{model.folder}: {name} is part of a LoRA beside the weights.", _FUSE)
        raise Misuse(f"{model.folder}: the weights hold {name}, which the config does not know.", _CURE)


def put(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Sets the parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    place(module.get_submodule(path), leaf, value)
