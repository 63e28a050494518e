"""dit2deploy: from a quantized Diffusion Transformer to a small, fast, verified engine."""

from importlib import import_module, metadata
from typing import Any

try:
    __version__ = metadata.version("dit2deploy")
except metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

# Public names come on first use: `import dit2deploy` loads neither torch nor a runtime.
_PUBLIC = {"load": "dit2deploy.drop_in", "Bundle": "dit2deploy.artefacts.bundle", "compile": "dit2deploy.pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


__all__ = ["Bundle", "__version__", "compile", "load"]
