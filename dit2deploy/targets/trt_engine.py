"""What an engine file of TensorRT-RTX tells without a GPU. The layout is undocumented: as read in release 1.7."""

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit2deploy.base.errors import Misuse

MAGIC = b"vtrt"
# Where the header has the file's size, TensorRT's version and the bits of capabilities, and how long it is.
_SIZE, _VERSION, _MASK, _HEADER = 16, 24, 32, 64
_BITS = {1: "7.5", 2: "8.0", 4: "8.6", 8: "8.9", 16: "12.0", 32: "12.1"}
_CURE = "Build it anew."
# A plugin's name (group 2), preceded by its length in 8 bytes.
PLUGIN_NAME = re.compile(
    rb"(?s)(.)\0{7}((?:AdaLn|(?:Gated)?Activation)?HadamardQuantize(?:Keep)?|MonarchAdd|MultiRegionQuantize|QuantMatMul"
    rb"|[A-Z][A-Za-z0-9]{0,30}Gemm(?:LowRank)?(?:Residual)?)(?![A-Za-z0-9_])"
)
_LEAST = 64  # bytes: smaller tensors are folded into shapes, or found by chance


def inspect_engine(path: Path) -> dict[str, Any]:
    """What read_header tells, and plugins ({name: how many layers}). Raises Misuse as it does."""
    header = read_header(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = PLUGIN_NAME.finditer(content)
        plugins = Counter(match[2].decode() for match in found if match[1][0] == len(match[2]))
    return {**header, "plugins": dict(sorted(plugins.items()))}


def read_header(path: Path) -> dict[str, Any]:
    """magic, tensorrt (version), sm_mask, compute_capabilities, bytes.

    Raises Misuse for a file that is missing or no engine.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(_HEADER)
    except OSError as error:
        raise Misuse(f"{path}: cannot be read: {error.strerror}.", _CURE) from None
    if len(header) < _HEADER or not header.startswith(MAGIC):
        raise Misuse(f"{path}: is no TensorRT engine, or a truncated one.", _CURE)
    if struct.unpack_from("<Q", header, _SIZE) != (size,):
        raise Misuse(f"{path}: is a truncated TensorRT engine ({size} bytes).", _CURE)
    (mask,) = struct.unpack_from("<I", header, _MASK)
    return {
        "magic": MAGIC.decode(),
        "tensorrt": ".".join(map(str, header[_VERSION : _VERSION + 4])),
        "sm_mask": mask,
        "compute_capabilities": [name for bit, name in _BITS.items() if mask & bit],
        "bytes": size,
    }


def found_once(path: Path, tensors: Iterable[bytes]) -> tuple[int, int]:
    """(how many different tensors there are, how many of them the file holds raw exactly once)."""
    different = {content for content in tensors if len(content) >= _LEAST}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        places = ((tensor, content.find(tensor)) for tensor in different)
        return len(different), sum(at >= 0 and content.find(tensor, at + 1) < 0 for tensor, at in places)
