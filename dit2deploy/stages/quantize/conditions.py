"""Calibration on the conditions alone: layers that read timestep and class, and nothing else, see a finite set.

TFMQ-DM (https://arxiv.org/abs/2311.16503) finds that quantized temporal features drift from those of full precision,
and that their layers need no images: timesteps are a finite set, so that these layers can be calibrated on all of it,
and reconstructed against their own outputs instead of through the blocks. Of a DiT these are the embedder of each block
and its modulation (adaLN) linear, which read timestep and class: the set is their product. Two parts of the paper have
nothing to do here: activation ranges for each timestep (its finite set calibration), because every token has a scale of
its own at run time and a token of these layers is one timestep; and one block of all embeddings, because in the
diffusers DiT each block has an embedder of its own. [inferred] Layers are reconstructed one by one.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse

_LAYER = r"transformer_blocks\.\d+\.norm1\.(linear|emb\..*)"


def check(policy: Policy, linears: Mapping[str, tuple[int, int]]) -> None:
    """Misuse where a layer of `calls` "conditions" reads more than timestep and class, as far as we know the model, and
    where its second moments are to be weighted by the steps of trajectories."""
    for name in linears:
        layer = policy.layers[name]
        if layer.is_quantized and layer.calls == "conditions":
            if layer.hessian == "fisher":
                raise Misuse(f"layer {name}: Fisher scores are of trajectories.", "Set its `hessian` to uniform.")
            if policy.model != "DiTTransformer2DModel" or not re.fullmatch(_LAYER, name):
                raise Misuse(
                    f"layer {name}: is not known to read timestep and class alone.",
                    "Set its `calls` to trajectory in the policy.",
                )


class Conditions:
    """Calls of a ConditionPart: a call holds one timestep of the calibration set with every class and no class."""

    def __init__(self, calibration: CalibrationSet, classes: int) -> None:
        """`classes` is the number of classes, which is the null label too."""
        self._timesteps = sorted(set(calibration.manifest.timesteps), reverse=True)
        self._classes = classes

    def __len__(self) -> int:
        return len(self._timesteps)

    def call(self, index: int) -> dict[str, np.ndarray]:
        labels = np.arange(self._classes + 1)
        return {"timestep": np.full(len(labels), self._timesteps[index]), "class_labels": labels}


class ConditionPart(torch.nn.Module):
    """The part of a DiT that reads the conditions alone, with the names of its layers: a forward runs each block's
    norm1 on one token of zeros."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        # No ModuleList: these are not blocks that a walk could take one by one, as a forward runs a part of each.
        self.transformer_blocks = torch.nn.Module()
        for index, block in network.get_submodule("transformer_blocks").named_children():
            self.transformer_blocks.add_module(index, block)

    def forward(self, *, timestep: torch.Tensor, class_labels: torch.Tensor, return_dict: bool = False) -> tuple:
        for block in self.transformer_blocks.children():
            norm = block.get_submodule("norm1")
            width = norm.get_parameter("emb.class_embedder.embedding_table.weight").shape[1]
            norm(torch.zeros(len(timestep), 1, width), timestep, class_labels, hidden_dtype=torch.float32)
        return ()
