"""What is special about one family of transformers, as one value: roles of layers, inputs, dynamic axes, swaps."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dit2deploy.artefacts import onnx_model
from dit2deploy.models.folds import Fold, Linears

Role = Literal["block", "modulation", "embedding", "final", "other"]
Config = Mapping[str, Any]  # of the module (`module.config`): defaults filled in
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Axis:
    """A dynamic axis: its name, the number that its length is a multiple of, and the largest such multiple.

    `usual` and `longest`: the lengths that its family's pipelines ask for most, and at most.
    """

    name: str
    multiple: int = 1
    most: int | None = None
    usual: int = 1
    longest: int = 1

    def record(self) -> onnx_model.AxisRecord:
        """What engines of a bounded range take: one multiple at least, `longest` at most or what the model can."""
        bound = None if self.most is None else self.most * self.multiple
        most = self.longest if bound is None else min(self.longest, bound)
        usual, most = (max(length // self.multiple, 1) * self.multiple for length in (min(self.usual, most), most))
        return onnx_model.AxisRecord(
            name=self.name, least=self.multiple, usual=usual, most=most, multiple=self.multiple, bound=bound
        )


BATCH = Axis(onnx_model.BATCH, usual=2, longest=16)
# Of models whose activations are gigabytes.
SMALL_BATCH = Axis(onnx_model.BATCH, usual=2, longest=4)


def no_swaps(module: torch.nn.Module) -> None:
    """Most families export as they are."""


def unchanged(value: Any) -> Any:
    """Most families' arguments and results are tensors, as an engine has them."""
    return value


def no_folds(linears: Linears) -> list[Fold]:
    """Nothing is known to be foldable."""
    return []


@dataclass(frozen=True)
class Family:
    """One family.

    `inputs(config, batch=, seed=, second=)` makes keyword arguments of one call with random values: int64 timesteps or
    float32 ones as the family's pipeline passes them; `second` asks for other lengths of the dynamic axes.
    `axes(config)` names the dynamic axes: input name -> dim -> Axis. All that it leaves out is fixed by the config.
    `adapt(module)` lets a module be called with the tensors of `inputs` where diffusers' forward takes something else;
    `arguments`, `result` translate for an engine in a pipeline: what diffusers' forward takes and gives, and back.
    `swap(module)` replaces, in a module that is about to be exported, what an ONNX file cannot hold.
    `resize(module, size)` readies it for latents of another height and width, where a graph fixes them; None: it does
    not. Raises Misuse for a size that the model cannot have.
    `folds(linears)` names the places that smoothing can use among a model's linears, see models/folds.py.
    """

    name: str
    class_name: str
    roles: tuple[tuple[str, Role], ...]  # (pattern of the whole layer name, role); the first match counts
    inputs: Callable[..., Inputs]
    axes: Callable[[Config], Mapping[str, Mapping[int, Axis]]]
    tiny: Config  # a config of a few ten thousand parameters, for tests
    timestep_scale: float = 1.0  # argument `timestep` times this is in 0 .. training steps
    conditioning: Literal["class", "text", "unknown"] = "text"
    null_label: Callable[[Config], int] | None = None  # the class of "no class", for guidance
    latent_shape: Callable[[Config], tuple[int, ...]] | None = None  # of one sample, where the config fixes it
    adapt: Callable[[torch.nn.Module], None] = no_swaps
    arguments: Callable[[dict[str, Any]], dict[str, Any]] = unchanged
    result: Callable[[torch.Tensor], Any] = unchanged
    swap: Callable[[torch.nn.Module], None] = no_swaps
    resize: Callable[[Any, tuple[int, int]], None] | None = None
    folds: Callable[[Linears], Sequence[Fold]] = no_folds
    assumptions: tuple[str, ...] = ()

    def role(self, layer: str) -> Role:
        """What the layer of that name is for."""
        return next((role for pattern, role in self.roles if re.fullmatch(pattern, layer)), "other")

    def batch_axes(self, config: Config) -> dict[str, int]:
        """The axis of the samples of each input that has one; the others (positions) are the same for all samples."""
        axes = self.axes(config).items()
        return {name: dim for name, dims in axes for dim, axis in dims.items() if axis.name == BATCH.name}

    def classes_and_shape(self, config: Config) -> tuple[int, tuple[int, ...]]:
        """(number of classes, which is the null label too; shape of one latent) of a class-conditional model.

        Raises ValueError for another family.
        """
        if self.null_label is None or self.latent_shape is None:
            raise ValueError(f"the family {self.name} is not class-conditional")
        return self.null_label(config), self.latent_shape(config)


def random_inputs(seed: int, **specs: tuple[int, ...]) -> Inputs:
    """float32 normal tensors of the shapes given, from one generator."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in specs.items()}


def at_size(inputs: Inputs, size: tuple[int, int] | None) -> Inputs:
    """The inputs with random latents of another height and width; None: as they are."""
    if size is None:
        return inputs
    latents = inputs["hidden_states"]
    generator = torch.Generator().manual_seed(int(latents.abs().sum()))
    return {**inputs, "hidden_states": torch.randn(*latents.shape[:-2], *size, generator=generator)}


def spread(batch: int, seed: int, *, end: float = 1000.0) -> torch.Tensor:
    """float32 [batch] timesteps that cover 0 .. end: one in each of `batch` equal bands."""
    offset = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    return (torch.arange(batch) + offset) / batch * end
