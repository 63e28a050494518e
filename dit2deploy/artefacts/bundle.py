"""The bundle: engines for each target, the plugin library, recorded evidence, a manifest that vouches for every file.

manifest.json
config.json                 of the diffusers transformer
scheduler/scheduler_config.json
policy.json
reference/steps.safetensors recorded inputs ("input.NAME" [S, B, ..]) and outputs ("quantized" and, where the model
                            was at hand, "full_precision" [S, B, ..]) of single denoising steps
TARGET/..                   what that target's build wrote
parity.json profile.json report.html    written later: not in the manifest's list of hashes
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.onnx_model import LayerRecord, PortRecord
from dit2deploy.artefacts.policy import FILE as POLICY_FILE
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import TensorFile, inside, read_json, sha256_of_file

MANIFEST = "manifest.json"
CONFIG = "config.json"
SCHEDULER = "scheduler/scheduler_config.json"
REFERENCE = "reference/steps.safetensors"
PARITY = "parity.json"
PROFILE = "profile.json"
QUALITY = "quality.json"
REPORT = "report.html"
_CURE = "Make it anew with `dit2deploy build`."


class Thresholds(schema.Record):
    """Least SQNR in dB of the engine against the quantized PyTorch reference.

    `layer_db`: of each layer, PyTorch going on from the engine's outputs of the layers before; `channel_db`: of its
    worst output channel by the median error of its tokens, where a single wrong weight shows. Whole models are not
    compared as closely: a rounding tie that falls the other way moves a code, and behind it others, in any two
    implementations.
    """

    layer_db: float = 40.0
    channel_db: float = 85.0
    step_db: float = 20.0
    trajectory_db: float = 20.0

    @classmethod
    def of_significand(cls, bits: int) -> "Thresholds":
        """Of an engine whose activations are rounded to so many bits: p = 11 for float16, 8 for bfloat16.

        A rounding to p bits leaves errors of e = 0.39 * 2**-p of a value, root of the mean square (uniform within half
        a unit in the last place, mantissas log-uniform). A rotation makes them normal. Before a quantizer whose codes
        have the root mean square c, in steps, r roundings so move a value by sqrt(r) e c steps, and over a tie with
        the probability sqrt(2 / pi) of that; a code that moves is off by one step. Hence the SQNR of a layer that goes
        on from the engine's values, c**2 over that probability,

            10 log10(2**p) + 5.0 + 10 log10(c) - 5 log10(r):  3 dB a bit, where a rounding alone has 6.

        4-bit activations (c = 2.8) behind two roundings: 41 dB in float16 and 32 in bfloat16; the worst layers of a
        tiny DiT and of the demo have 39 and 29. `layer_db` allows 1-bit activations (c = 1/2) behind eight roundings.
        `channel_db`: one channel apart from the others errs, in the median token, by 2 * 2**-p at the most. `step_db`,
        `trajectory_db`: the noise of ten such layers. None is stricter than in float32 (24 bits), to which the
        formulas give its own.
        """
        powers = 10 * math.log10(2) * bits
        layer, channel = min(cls().layer_db, powers - 2.5), min(cls().channel_db, 2 * powers - 6)
        whole = min(cls().step_db, layer - 10)
        return cls(layer_db=layer, channel_db=channel, step_db=whole, trajectory_db=whole)


class TargetRecord(schema.Record):
    """One target's engines: `files` are relative to the bundle, `engines` maps a label (e.g. "sm86") to one of them."""

    engines: dict[str, str]
    files: tuple[str, ...]
    weight_bytes: int  # of the packed weights and everything else that the engine stores
    thresholds: Thresholds | None = None  # None: those of the bundle
    details: dict[str, Any] = {}
    versions: dict[str, str] = {}


class SizeRecord(schema.Record):
    """Bytes: of the full-precision weights in float32, and of what the bundle holds of them, by part."""

    float32: int
    parts: dict[str, int]

    @property
    def ratio(self) -> float:
        return self.float32 / max(1, sum(self.parts.values()))


class BundleManifest(schema.Record):
    schema_version: Literal[1] = 1
    kind: Literal["bundle"] = "bundle"
    model: str
    family: str
    created: str  # UTC, ISO 8601
    inputs: tuple[PortRecord, ...]
    outputs: tuple[PortRecord, ...]
    layers: dict[str, LayerRecord]
    targets: dict[str, TargetRecord]
    size: SizeRecord
    thresholds: Thresholds = Thresholds()  # of targets that have none of their own
    provenance: dict[str, str]  # model_path, model_sha256, checkpoint, checkpoint_sha256, policy_sha256, onnx, ..
    versions: dict[str, str] = {}
    sha256: dict[str, str]  # of every file listed, by path relative to the bundle


@dataclass(frozen=True)
class Bundle:
    """`Bundle.load(path)` checks every hash; a bundle runs where torch is not installed."""

    folder: Path
    manifest: BundleManifest

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / CONFIG, cure=_CURE)

    @property
    def scheduler_config(self) -> dict[str, Any] | None:
        path = self.folder / SCHEDULER
        return read_json(path) if path.exists() else None

    @property
    def policy(self) -> Policy | None:
        """None of a bundle that was built where its checkpoint was gone."""
        path = self.folder / POLICY_FILE
        return Policy.load(path) if path.is_file() else None

    def reference(self) -> dict[str, np.ndarray]:
        tensors = TensorFile(self.folder / REFERENCE, cure=_CURE)
        return {name: tensors.read(name) for name in tensors}

    def target(self, name: str) -> TargetRecord:
        if name not in self.manifest.targets:
            there = ", ".join(self.manifest.targets) or "none"
            raise Misuse(f"{self.folder}: has no engine for {name} (there: {there}).", "Build it for that target.")
        return self.manifest.targets[name]

    def thresholds(self, target: str) -> Thresholds:
        return self.target(target).thresholds or self.manifest.thresholds

    def path(self, name: str) -> Path:
        """A file of the bundle by its relative name; Misuse where the name leads out of it."""
        return inside(self.folder, name)

    @classmethod
    def load(cls, folder: str | os.PathLike, *, check_hashes: bool = True) -> "Bundle":
        """Raises Misuse for a bundle that is missing, broken, of a newer schema, or whose files were changed."""
        folder = Path(folder)
        manifest = schema.load(BundleManifest, folder / MANIFEST, cure=_CURE)
        bundle = cls(folder, manifest)
        for name, digest in manifest.sha256.items():
            path = bundle.path(name)
            if not path.is_file():
                raise Misuse(f"{path}: no such file, although the manifest lists it.", _CURE)
            if check_hashes and sha256_of_file(path) != digest:
                raise Misuse(f"{path}: is not the file that the manifest vouches for (hash mismatch).", _CURE)
        for target in manifest.targets.values():
            for name in (*target.files, *target.engines.values()):
                if name not in manifest.sha256:
                    raise Misuse(f"{folder}: the manifest does not vouch for {name}.", _CURE)
        return bundle
