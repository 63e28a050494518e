"""What TensorRT would find out again in every run: times of its kernels, and kernels compiled for the GPU at hand.

Such a cache saves time and nothing else: one that is broken, foreign or cannot be written is left out with a note.
Files lie in `folder()`, hold the SHA-256 of their content before it, and are written whole.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import write_bytes
from dit2deploy.base.progress import note
from dit2deploy.targets import cuda

VARIABLE = "DIT2DEPLOY_CACHE"
_DIGEST = hashlib.sha256().digest_size


def folder() -> Path:
    """$DIT2DEPLOY_CACHE, else the user's own for such things. TensorRT-RTX runs the machine code that lies there: no
    place for files of others."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit2deploy"


def timing_file(place: Path, package: str, version: str) -> Path:
    """Of the GPU at hand and a release of TensorRT: times of others mean nothing."""
    return place / f"{package}-{version}-{_device()}.timing"


def kernels_file(package: str, version: str, engine_sha256: str) -> Path:
    """Of one engine on the GPU at hand."""
    return folder() / f"{package}-{version}-{_device()}-{engine_sha256[:16]}.kernels"


def _device() -> str:
    told = f"sm{cuda.capability().replace('.', '')} {cuda.name()}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", told).strip("-")


def read(path: Path) -> bytes:
    """What was written there; b"" where nothing was, and, with a note, where it is not that any more."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        note(f"{path}: cannot be read, so it is left out: {error.strerror}")
        return b""
    digest, content = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        note(f"{path}: is broken, so it is left out and made anew")
        return b""
    return content


def write(path: Path, content: bytes) -> None:
    """A note tells where it could not be written."""
    try:
        write_bytes(path, hashlib.sha256(content).digest() + content)
    except Misuse as error:
        note(f"not kept for the next time: {error.cause}")


class TimingCache:
    """Times of TensorRT's kernels in a builder's config, from a file and back into it."""

    def __init__(self, config: Any, path: Path) -> None:
        self._path, self._read = path, read(path)
        self._cache = config.create_timing_cache(self._read)
        if self._cache is None or not config.set_timing_cache(self._cache, ignore_mismatch=False):
            note(f"{path}: is of another GPU or TensorRT, so it is left out and made anew")
            self._cache = config.create_timing_cache(b"")
            config.set_timing_cache(self._cache, ignore_mismatch=False)

    def store(self) -> None:
        content = bytes(self._cache.serialize())
        if content != self._read:
            write(self._path, content)


class KernelCache:
    """Kernels that TensorRT-RTX compiled for the GPU at hand, from a file and back into it; in what is made by
    `config`, an engine's IRuntimeConfig. A CUDA context must be current: the cache is compared with it."""

    def __init__(self, config: Any, path: Path) -> None:
        self._path, self._stored = path, read(path)
        self._cache = config.create_runtime_cache()
        if self._stored and not self._cache.deserialize(self._stored):
            note(f"{path}: is of another GPU, driver or TensorRT-RTX, so it is left out and made anew")
        if not config.set_runtime_cache(self._cache):
            note("TensorRT-RTX takes no runtime cache here: it compiles its kernels whenever an engine is opened")

    def store(self) -> None:
        content = bytes(self._cache.serialize())
        if content != self._stored:
            write(self._path, content)
            self._stored = content
