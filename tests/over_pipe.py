"""The kernels of another CPU, run by qemu-user: calls of the C entry over a pipe (plugins/over_pipe/main.cc)."""

import atexit
import functools
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from dit2deploy.base.errors import Failed
from dit2deploy.ops import OPS
from dit2deploy.ops.op import NUMPY

# CPU models of qemu: NEON alone, with byte dot products, with byte matrix products. The last variant that runs is used.
CPUS = ("cortex-a72", "neoverse-n1", "max")


@functools.cache
def _process(cpu: str) -> subprocess.Popen:
    qemu, folder = shutil.which("qemu-aarch64"), os.environ.get("D2D_TEST_LIBRARIES")
    if qemu is None:
        pytest.skip("no qemu-aarch64 (Debian: qemu-user)")
    if folder is None:
        pytest.skip("$D2D_TEST_LIBRARIES names no folder of test libraries")
    program = Path(folder) / "aarch64" / "dit2deploy_over_pipe"
    if not program.is_file():
        pytest.skip(f"{program} was not built (Debian: g++-aarch64-linux-gnu)")
    process = subprocess.Popen([qemu, "-cpu", cpu, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(process.kill)
    return process


def run(
    cpu: str,
    op: str,
    inputs: Sequence[np.ndarray],
    attributes: Mapping[str, int | str],
    shapes: Sequence[tuple[int, ...]],
    *,
    isa: str,
    threads: int = 1,
) -> list[np.ndarray]:
    """One node on a CPU model of qemu, as targets.kernel.run does it here; skips where that cannot be."""
    process = _process(cpu)
    known = next(known for known in OPS if known.name == op)
    dtypes = [np.dtype(NUMPY[known.dtype(port, attributes)]) for port in known.outputs]
    parts = [_text(op), _text(isa), _int(threads), _int(len(attributes))]
    for name, value in attributes.items():
        told = _int(1) + _text(value) if isinstance(value, str) else _int(0) + struct.pack("<q", value)
        parts += [_text(name), told]
    parts += [_int(len(inputs))]
    for value in inputs:
        parts += [_tensor(value.dtype, value.shape), value.tobytes()]
    parts += [_int(len(shapes)), *(_tensor(dtype, shape) for dtype, shape in zip(dtypes, shapes, strict=True))]
    process.stdin.write(b"".join(parts))
    process.stdin.flush()
    if struct.unpack("<i", _read(process, 4))[0]:
        raise Failed(_read_text(process), "See the kernel's message.")
    outputs = []
    for dtype, shape in zip(dtypes, shapes, strict=True):
        held = _read(process, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        outputs.append(np.frombuffer(held, dtype).reshape(shape))
    return outputs


def _int(value: int) -> bytes:
    return struct.pack("<i", value)


def _text(value: str) -> bytes:
    return _int(len(value)) + value.encode()


def _tensor(dtype: np.dtype, shape: Sequence[int]) -> bytes:
    return (
        _int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
        + _int(len(shape))
        + struct.pack(f"<{len(shape)}q", *shape)
    )


def _read(process: subprocess.Popen, count: int) -> bytes:
    held = process.stdout.read(count)
    assert len(held) == count, f"the program ended with {process.wait()}"
    return held


def _read_text(process: subprocess.Popen) -> str:
    return _read(process, struct.unpack("<i", _read(process, 4))[0]).decode()
