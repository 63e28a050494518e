"""The quantized checkpoint: packed weights under the state_dict keys of the quantized modules, and the policy.

Of a quantized linear NAME there are
    NAME.weight        int32 [N, words]   packed codes (formats.py)
    NAME.weight_scale  float32 [N, G]
    NAME.bias          float32 [N]        zeros where the layer has none
    NAME.qmax          float32 [T]        largest activation code of each timestep group
    NAME.down, NAME.up float16 [r, K], [N, r]   where the policy gives a low-rank branch; down acts on the input
                                                before rotation
    NAME.monarch_down, NAME.monarch_up float16 [K, r, B], [A, r, N]   where it gives a Monarch branch of A x B blocks of
                                                rank r, on the same input (quantizers/monarch.py)
    NAME.regions       float32 [T, 3]     where the policy gives regions: split, step below it, step from it on
Of an attention NAME whose products are quantized there are
    NAME.processor.qmax, NAME.processor.probability_qmax   float32 [T]
    NAME.processor.regions                                 float32 [T, 3]   of the probabilities
All other tensors keep name, shape and dtype of the model, but for bfloat16 ones, which are float32 here.

Equal tensors are stored once, under the first name (base/files.py: write_distinct_tensors): the diffusers folder of a
converted DiT holds one timestep and class embedder in every block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.compressed_tensors import described
from dit2deploy.artefacts.policy import FILE as POLICY_FILE
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import (
    TensorFile,
    read_json,
    sha256_of_file,
    whole_folder,
    write_distinct_tensors,
    write_json,
)

MANIFEST = "quantization_config.json"
CONFIG = "config.json"
TENSORS = "diffusion_pytorch_model.safetensors"  # the name that diffusers looks for
SCHEDULER = "scheduler/scheduler_config.json"
_CURE = "Make it anew with `dit2deploy quantize`."


METHOD = "dit2deploy"  # quant_method, by which diffusers finds dit2deploy.diffusers


def told_to_diffusers(policy: Policy) -> dict[str, Any]:
    """`quantization_config` of config.json: the policy, which is all that loading needs, and what others read of it."""
    return {"quant_method": METHOD, "policy": policy.model_dump(mode="json"), **described(policy)}


class CheckpointManifest(schema.Record):
    """quantization_config.json: where the weights come from."""

    schema_version: Literal[1] = 1
    quant_method: Literal["dit2deploy"] = METHOD
    model: str  # class name of the transformer
    model_sha256: str  # of the full-precision weights
    model_path: str  # where they were (provenance; parity looks there first)
    policy_sha256: str
    calibration_sha256: str
    seed: int
    iterations: int | None = None  # of each block's reconstruction; None: as many as its size asks for, or none needed
    layer_seconds: dict[str, float] = {}
    training: dict[str, Any] = {}  # of a checkpoint that was finetuned: its inputs, settings, losses
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    manifest: CheckpointManifest
    policy: Policy
    config: dict[str, Any]  # of the diffusers transformer
    tensors: TensorFile

    @property
    def scheduler_config(self) -> dict[str, Any] | None:
        path = self.folder / SCHEDULER
        return read_json(path) if path.exists() else None

    @property
    def sha256(self) -> str:
        return sha256_of_file(self.folder / TENSORS)

    @classmethod
    def save(
        cls,
        out: Path,
        manifest: CheckpointManifest,
        *,
        tensors: Mapping[str, np.ndarray],
        policy: Policy,
        config: Mapping[str, Any],
        scheduler_config: Mapping[str, Any] | None,
    ) -> "Checkpoint":
        """Writes the folder whole or not at all; tensors are read one at a time, in their order."""
        with whole_folder(out, replaces=schema.holds(CheckpointManifest, MANIFEST)) as folder:
            write_distinct_tensors(folder / TENSORS, tensors)
            write_json(folder / CONFIG, {**config, "quantization_config": told_to_diffusers(policy)})
            if scheduler_config is not None:
                write_json(folder / SCHEDULER, scheduler_config)
            policy.save(folder / POLICY_FILE)
            schema.save(manifest, folder / MANIFEST)
        return cls.load(out)

    @classmethod
    def load(cls, folder: Path) -> "Checkpoint":
        """Raises Misuse for a checkpoint that is missing, broken, of a newer schema or of another policy."""
        manifest = schema.load(CheckpointManifest, folder / MANIFEST, cure=_CURE)
        policy = Policy.load(folder / POLICY_FILE)
        if policy.sha256 != manifest.policy_sha256:
            raise Misuse(f"{folder}: policy.json is not the policy that the weights were packed by.", _CURE)
        config = read_json(folder / CONFIG, cure=_CURE)
        config.pop("quantization_config", None)  # the same policy, for diffusers
        return cls(folder, manifest, policy, config, TensorFile(folder / TENSORS, cure=_CURE))
