"""What an engine is compared with: PyTorch modules where they can be had, else outputs recorded in the bundle."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit2deploy.artefacts.bundle import REFERENCE, Bundle
from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.base.errors import Misuse
from dit2deploy.base.memory import room

Layers = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Reference:
    """One side that an engine is compared with.

    `load` gives the torch module, None where `reason` says why not; `layers` its quantized layers by name. `outputs`:
    recorded ones [S, B, ..] or None.
    """

    name: str
    load: Callable[[], Any] | None
    layers: Layers
    outputs: np.ndarray | None
    reason: str = ""
    where: str = ""


@dataclass(frozen=True)
class References:
    quantized: Reference
    full_precision: Reference
    feeds: list[dict[str, np.ndarray]] = field(default_factory=list)  # inputs of the recorded steps


def find(bundle: Bundle, *, model: Path | None, checkpoint: Path | None, max_memory: int | None = None) -> References:
    """Looks at the paths given, then where the bundle says its sources were. A source that is gone is no error, one
    that is given and does not fit is (Misuse). Half of the memory that is left below `max_memory` when one is loaded
        holds weights; layers beyond read theirs at each call."""
    recorded = bundle.reference() if bundle.path(REFERENCE).is_file() else {}
    feeds = _feeds(bundle, recorded)
    provenance = bundle.manifest.provenance
    return References(
        quantized=_quantized(bundle, checkpoint, provenance, recorded.get("quantized"), max_memory),
        full_precision=_full_precision(bundle, model, provenance, recorded.get("full_precision"), max_memory),
        feeds=feeds,
    )


def _feeds(bundle: Bundle, recorded: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    names = [port.name for port in bundle.manifest.inputs]
    if not recorded:
        return []
    missing = [name for name in names if f"input.{name}" not in recorded]
    if missing:
        raise Misuse(f"{bundle.folder}: its recorded steps lack the input {missing[0]}.", "Build the bundle anew.")
    count = len(recorded[f"input.{names[0]}"])
    return [{name: recorded[f"input.{name}"][index] for name in names} for index in range(count)]


def _quantized(
    bundle: Bundle,
    given: Path | None,
    provenance: Mapping[str, str],
    outputs: np.ndarray | None,
    max_memory: int | None,
) -> Reference:
    def layers(module: Any) -> Mapping[str, Any]:
        from dit2deploy.nn.convert import quantized_linears

        return quantized_linears(module)

    name = "quantized PyTorch"
    folder = Path(given) if given else Path(provenance["checkpoint"])
    reason = _without_torch() or ("" if given or folder.is_dir() else f"the checkpoint {folder} is not there")
    if reason:
        return Reference(name, None, layers, outputs, reason)
    checkpoint = Checkpoint.load(folder)
    if checkpoint.sha256 != provenance["checkpoint_sha256"]:
        raise Misuse(f"{folder}: is not the checkpoint that {bundle.folder} was made from.", "Build the bundle anew.")

    def load() -> Any:
        from dit2deploy.nn.convert import load_quantized

        return load_quantized(checkpoint, keep=_for_weights(max_memory))

    return Reference(name, load, layers, outputs, where=str(folder))


def _full_precision(
    bundle: Bundle,
    given: Path | None,
    provenance: Mapping[str, str],
    outputs: np.ndarray | None,
    max_memory: int | None,
) -> Reference:
    def layers(module: Any) -> Mapping[str, Any]:
        return {name: module.get_submodule(name) for name in bundle.manifest.layers}

    name = "full-precision PyTorch"
    folder = Path(given or provenance.get("model_path", ""))
    reason = _without_torch()
    if not reason and not given and ("model_path" not in provenance or not folder.is_dir()):
        reason = f"the full-precision model is not there ({provenance.get('model_path', 'its place was not noted')})"
    if reason:
        return Reference(name, None, layers, outputs, reason)
    from dit2deploy.models.load import load_transformer, open_model

    expected = provenance.get("model_sha256")
    if expected is not None and open_model(folder).sha256 != expected:
        raise Misuse(f"{folder}: is not the model that {bundle.folder} was made from.", "Give that one by --model.")

    def load() -> Any:
        return load_transformer(folder, keep=_for_weights(max_memory))[0]

    return Reference(name, load, layers, outputs, where=str(folder))


def _for_weights(max_memory: int | None) -> int:
    return max(0, room(max_memory)) // 2


def _without_torch() -> str:
    return "" if importlib.util.find_spec("torch") else "torch is not installed"
