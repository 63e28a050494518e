"""An engine with the face of a diffusers transformer, for pipelines."""

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dit2deploy.artefacts.bundle import CONFIG, Bundle
from dit2deploy.artefacts.onnx_model import PortRecord
from dit2deploy.base.errors import Misuse
from dit2deploy.models.load import known_family
from dit2deploy.models.pipeline import says_nothing

_ENGINE_ONLY = "Give the engine float32 tensors on the CPU; other precisions and devices take another target."


class Engine(Protocol):
    """A Runner of dit2deploy.targets."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


class EngineTransformer:
    """An engine with the face of a diffusers transformer: call, `config`, `dtype`, `device`.

    No torch.nn.Module: it has no parameters, and pipelines that move or offload modules leave it alone.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, bundle: Bundle, runner: Engine) -> None:
        config = bundle.config
        self._family = known_family(config["_class_name"], bundle.folder / CONFIG)
        original = getattr(diffusers, config["_class_name"])
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(original.__init__).parameters.items()
            if parameter.default is not parameter.empty
        }
        self.config = FrozenDict({**defaults, **config})
        self.bundle = bundle
        self._runner = runner
        self._signature = inspect.signature(original.forward)
        self._ports = {port.name: port for port in bundle.manifest.inputs}
        self._output = bundle.manifest.outputs[0].name

    def __call__(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Arguments are those of the diffusers class's forward; the output is float32 on the CPU.

        Raises Misuse for an argument that the engine lacks or does not know.
        """
        try:
            bound = self._signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise Misuse(f"{self.config['_class_name']}: {error}.", "Call it as the diffusers transformer.") from None
        bound.apply_defaults()
        given = dict(bound.arguments)
        given.pop(next(iter(self._signature.parameters)))
        return_dict = given.pop("return_dict", True)
        given = self._family.arguments(given)
        inputs = {name: _array(given.pop(name, None), port) for name, port in self._ports.items()}
        for name, value in given.items():
            if not says_nothing(value, self._signature.parameters[name].default):
                raise Misuse(f"the engine does not know the argument {name}.", "Leave it out.")
        sample = self._family.result(torch.from_numpy(self._runner.run(inputs)[self._output]))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def to(self, *args: Any, **kwargs: Any) -> "EngineTransformer":
        """Nothing, for the CPU and float32; Misuse for anything else."""
        for wanted in (*args, *kwargs.values()):
            if isinstance(wanted, torch.dtype):
                fits = wanted == self.dtype
            elif isinstance(wanted, str | torch.device):
                fits = torch.device(wanted).type == self.device.type
            else:
                fits = wanted is None or isinstance(wanted, bool)
            if not fits:
                raise Misuse(f"an engine for the CPU in float32 cannot be moved to {wanted}.", _ENGINE_ONLY)
        return self

    def eval(self) -> "EngineTransformer":
        return self

    def cache_context(self, *_names: Any, **_steps: Any) -> contextlib.AbstractContextManager:
        """Newer pipelines name their passes, for caches that an engine does not have."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Frees the engine."""
        self._runner.close()


def _array(value: Any, port: PortRecord) -> np.ndarray:
    if value is None:
        raise Misuse(f"the engine needs the argument {port.name}.", f"Give it as {port.dtype} {list(port.shape)}.")
    tensor = torch.as_tensor(value)
    if tensor.device.type != "cpu":
        raise Misuse(f"{port.name} is on {tensor.device}, the engine is on the CPU.", _ENGINE_ONLY)
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array = tensor.detach().numpy()
    made = array.astype(port.dtype, copy=False)
    if np.issubdtype(made.dtype, np.integer) and not np.array_equal(made, array):
        raise Misuse(f"{port.name} holds values that are no integers.", f"The engine takes {port.dtype}.")
    return np.ascontiguousarray(made)
