"""Quantized folders in diffusers: after `import dit2deploy.diffusers`, from_pretrained and save_pretrained know them.

What is loaded holds packed weights. On the CPU its linears compute by the compiled kernels; on another device as the
ops are defined, in PyTorch, which is exact and slow. A bundle (`dit2deploy.load`) is faster still: what lies between
the linears is fused there.
"""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import is_accelerate_available

from dit2deploy.artefacts.checkpoint import METHOD, told_to_diffusers
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.files import TensorFile
from dit2deploy.models.load import linears_of
from dit2deploy.nn.attention import QuantAttention
from dit2deploy.nn.convert import swap_linears, use_kernels
from dit2deploy.nn.quant_linear import QuantLinear


class _Method(str, Enum):
    """diffusers asks a quant_method for its `.value`."""

    DIT2DEPLOY = METHOD


class Dit2DeployConfig(QuantizationConfigMixin):
    """`quantization_config` of a transformer that `dit2deploy quantize` made: its policy.

    Raises pydantic's ValidationError (a ValueError) for a policy that is broken or newer.
    """

    def __init__(self, policy: Policy | Mapping[str, Any], **_unused: Any) -> None:
        self.quant_method = _Method.DIT2DEPLOY  # type: ignore[assignment]  # the base knows diffusers' own methods only
        self.policy = policy if isinstance(policy, Policy) else Policy.model_validate(policy)

    def __repr__(self) -> str:  # the base's own needs a method that only some of diffusers' configs have
        return f"Dit2DeployConfig({self.policy.method}, {len(self.policy.layers)} layers)"

    def to_dict(self) -> dict[str, Any]:
        return told_to_diffusers(self.policy)


class Dit2DeployQuantizer(DiffusersQuantizer):
    """Swaps the linears by name before diffusers loads the weights, and keeps the packed tensors' own dtypes."""

    requires_calibration = True  # diffusers then refuses full-precision folders: those go through `dit2deploy quantize`
    quantization_config: Dit2DeployConfig

    def validate_environment(self, *_unused: Any, **__: Any) -> None:
        if not is_accelerate_available():
            raise ImportError("diffusers loads quantized models by accelerate: pip install 'dit2deploy[diffusers]'")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """With those that the files hold under the name of an equal one; Misuse for a broken table of them."""
        self._stored_as: dict[str, str] = {}
        for file in map(Path, checkpoint_files):
            if file.suffix == ".safetensors":
                self._stored_as |= TensorFile(file).stored_as
        return [*loaded_keys, *self._stored_as]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        # Copies, so that the model's weights share no memory: that could not be saved again.
        copies = {name: stored for name, stored in self._stored_as.items() if stored in state_dict}
        return {**state_dict, **{name: state_dict[stored].clone() for name, stored in copies.items()}}

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return torch.float32  # what the reference computes in, whatever was asked for

    def _process_model_before_weight_loading(self, model: torch.nn.Module, **_unused: Any) -> None:
        policy = self.quantization_config.policy
        policy.check_covers(type(model).__name__, linears_of(model), where="quantization_config")
        swap_linears(model, policy)
        model.config.quantization_config = self.quantization_config

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **_unused: Any) -> torch.nn.Module:
        return use_kernels(model)

    def check_if_quantized_param(
        self, model: torch.nn.Module, param_value: torch.Tensor, param_name: str, state_dict: Any, **_unused: Any
    ) -> bool:
        return isinstance(model.get_submodule(param_name.rpartition(".")[0]), (QuantLinear, QuantAttention))

    def check_quantized_param_shape(self, param_name: str, current: torch.Tensor, loaded: torch.Tensor) -> bool:
        raise ValueError(
            f"{param_name} is {list(loaded.shape)}, its policy asks for {list(current.shape)}: "
            "the folder's config.json and weights do not belong together"
        )

    def create_quantized_param(
        self,
        model: torch.nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        *_unused: Any,
        **__: Any,
    ) -> None:
        layer, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(layer)
        empty = getattr(module, leaf)
        value = param_value.to(target_device, empty.dtype)
        setattr(module, leaf, torch.nn.Parameter(value, False) if isinstance(empty, torch.nn.Parameter) else value)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# diffusers has no other door for methods that live outside of it.
auto.AUTO_QUANTIZER_MAPPING[METHOD] = Dit2DeployQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Dit2DeployConfig
