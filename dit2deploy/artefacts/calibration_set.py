"""The calibration set: inputs of the transformer, recorded on its own denoising trajectories."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.timesteps import of_calls
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import TensorFile, sha256_of_file, sha256_of_json, whole_folder, write_tensors

MANIFEST = "manifest.json"
TENSORS = "inputs.safetensors"
_CURE = "Make it anew with `dit2deploy calibrate`."


class CalibrationManifest(schema.Record):
    """What the set was made of, so that it can be made again."""

    schema_version: Literal[1] = 1
    kind: Literal["calibration_set"] = "calibration_set"
    model: str  # class name of the transformer
    model_sha256: str  # of its weights
    scheduler: dict[str, Any]
    steps: int
    guidance: float
    seeds: tuple[int, ...]
    timesteps: tuple[int, ...]  # one a call
    prompts: tuple[str, ...] = ()  # of text-conditional models, where a pipeline drew them
    size: tuple[int | None, int | None] = (None, None)  # height, width in pixels; None: the pipeline's own
    command: str = ""
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class CalibrationSet:
    """`tensors` holds each keyword argument of the transformer with a leading axis of calls: [C, B, ..]."""

    folder: Path
    manifest: CalibrationManifest
    tensors: TensorFile

    def __len__(self) -> int:
        return len(self.manifest.timesteps)

    @property
    def sha256(self) -> str:
        """Of what the set holds: not of the command or the versions that made it."""
        # A set without prompts keeps the hash that it had before there were any.
        told = {"command", "versions"} | (set() if self.manifest.prompts else {"prompts", "size"})
        kept = self.manifest.model_dump(mode="json", exclude=told)
        return sha256_of_json([kept, sha256_of_file(self.tensors.path)])

    def call(self, index: int) -> dict[str, np.ndarray]:
        """Keyword arguments of one call of the transformer, [B, ..] each; no other call is read."""
        return {name: self.tensors.read_entry(name, index) for name in self.tensors}

    @classmethod
    def load(cls, folder: Path) -> "CalibrationSet":
        """Raises Misuse for a set that is missing, broken or of a newer schema, and for one by prompts whose timesteps
        are not those of its calls: older sets tell rounded ones, and are read as if they told them right."""
        manifest = schema.load(CalibrationManifest, folder / MANIFEST, cure=_CURE)
        tensors = TensorFile(folder / TENSORS, cure=_CURE)
        for name in tensors:
            if tensors.shape(name)[:1] != (len(manifest.timesteps),):
                raise Misuse(f"{folder}: {name} does not hold one entry for each of the timesteps.", _CURE)
        if manifest.prompts and "timestep" in tensors:
            recorded = tensors.read("timestep").reshape(len(manifest.timesteps), -1).max(axis=1)
            timesteps = of_calls(manifest.timesteps, recorded)
            if timesteps is None:
                raise Misuse(f"{folder}: its timesteps are not those of its calls.", _CURE)
            manifest = manifest.model_copy(update={"timesteps": timesteps})
        return cls(folder, manifest, tensors)

    @staticmethod
    def save(folder: Path, manifest: CalibrationManifest, tensors: Mapping[str, np.ndarray]) -> None:
        with whole_folder(folder, replaces=schema.holds(CalibrationManifest, MANIFEST)) as temporary:
            write_tensors(temporary / TENSORS, tensors)
            schema.save(manifest, temporary / MANIFEST)
