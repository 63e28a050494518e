"""The compiled kernels by themselves, through the C entry plugins/include/dit2deploy.h: no runtime, no torch."""

import ctypes
import functools
import json
import os
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.formats import by_name

LIBRARY_VARIABLE = "DIT2DEPLOY_LIBRARY"
LIBRARY_NAME = "libdit2deploy.so"
# The interchange layout of packed weights, and those that the CPU and the GPU kernels read in place.
INTERCHANGE, KERNEL_ORDER, FRAGMENT_ORDER = 0, 1, 2

_NUMBERS = {"float32": 1, "int8": 3, "int32": 6, "float16": 10, "bfloat16": 16}
_DTYPES = {"f32": "float32", "i8": "int8", "i32": "int32"}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
        ("data", ctypes.c_void_p),
    )


class _Attribute(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("text", ctypes.c_char_p), ("integer", ctypes.c_int64))


def library_path() -> Path:
    """The kernel library: what $DIT2DEPLOY_LIBRARY names, else the one that was installed with this package.

    Raises Misuse where there is none.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    # An editable install leaves the compiled library in site-packages, away from the package's sources.
    homes = (Path(__file__).resolve().parent.parent, Path(sysconfig.get_path("platlib")) / "dit2deploy")
    places = (Path(named),) if named else tuple(home / "lib" / LIBRARY_NAME for home in homes)
    path = next((place for place in places if place.is_file()), places[0])
    if not path.is_file():
        cure = (
            f"Let {LIBRARY_VARIABLE} name a compiled {LIBRARY_NAME}, or unset it."
            if named
            else f"Install the package (pip compiles the kernels), or let {LIBRARY_VARIABLE} name a compiled one."
        )
        raise Misuse(f"{path}: the kernel library is not there.", cure)
    return path.resolve()


def describe(*, library: Path | None = None) -> list[dict[str, Any]]:
    """The library's own list of ops: name, version, inputs, outputs, attributes, shapes (dit2deploy.h)."""
    return _describe(library or library_path())


def isas(*, library: Path | None = None) -> tuple[str, ...]:
    """Names of the instruction sets that the library runs on this machine, best last."""
    return tuple(_load(library or library_path()).d2d_isas().decode().split())


def isa_in_use(*, library: Path | None = None) -> str:
    """The instruction set in use: the best one, or what $DIT2DEPLOY_CPU names (Misuse where that cannot run)."""
    loaded = _load(library or library_path())
    name = loaded.d2d_isa_in_use()
    if not name:
        raise Misuse(_last_error(loaded), "Unset DIT2DEPLOY_CPU, or name one that `dit2deploy targets` lists.")
    return name.decode()


def run(
    op: str,
    inputs: Sequence[np.ndarray],
    attributes: Mapping[str, int | str],
    shapes: Sequence[tuple[int, ...]],
    *,
    isa: str | None = None,
    threads: int = 1,
    tactic: int = 0,
    library: Path | None = None,
) -> list[np.ndarray]:
    """Runs one node of domain `dit2deploy` with tensors in host memory and gives its outputs back.

    `inputs` by position in the op's dtypes (bfloat16: of ml_dtypes); `shapes` of the outputs; `isa` None: the one in
    use, "cuda": a GPU; `tactic` of the kernels for GPUs: 0, or the number, from 1, of one that `describe` lists. Raises
    Misuse for an op that the library does not know, and Failed with the kernel's message for what the kernel refuses.
    """
    path = library or library_path()
    loaded = _load(path)
    known = {entry["name"]: entry for entry in _describe(path)}
    if op not in known:
        raise Misuse(f"{path}: has no op {op} (there: {', '.join(known)}).", "Compile the library anew.")
    held = [np.ascontiguousarray(value) for value in inputs]
    outputs = [
        np.empty(shape, _dtype(port, attributes)) for shape, port in zip(shapes, known[op]["outputs"], strict=True)
    ]
    given = _attributes(attributes)
    tensors = _tensors([_in_host_memory(value) for value in held]), _tensors([_in_host_memory(v) for v in outputs])
    status = loaded.d2d_run(
        op.encode(),
        isa.encode() if isa else None,
        *(threads, tactic),
        *(given, len(given)),
        *(tensors[0], len(held)),
        *(tensors[1], len(outputs)),
    )
    if status:
        raise _refused(loaded, op)
    return outputs


class Memory(NamedTuple):
    """A dense row-major tensor somewhere: where it begins, its dtype and its shape."""

    address: int
    dtype: np.dtype
    shape: tuple[int, ...]


def launcher(
    op: str,
    inputs: Sequence[Memory],
    attributes: Mapping[str, int | str],
    outputs: Sequence[Memory],
    *,
    tactic: int = 0,
    workspace: int = 0,
    library: Path | None = None,
) -> Callable[[int], None]:
    """A function of a CUDA stream's handle (0: the default one) that enqueues one node of domain `dit2deploy` there.

    `inputs` and `outputs` by position, in memory of the GPU whose context is current where the function is called;
    `tactic` as of `run`; `workspace`: the address of as many bytes as `workspace_bytes` tells, or 0. The caller keeps
    all alive. It returns without waiting. The function raises Failed with the kernel's or the driver's message; work
    that fails later shows where the stream is waited for.
    """
    loaded = _load(library or library_path())
    given, sources, targets = _attributes(attributes), _tensors(inputs), _tensors(outputs)
    arguments = op.encode(), given, len(given), sources, len(inputs), targets, len(outputs), tactic, workspace or None

    def enqueue(stream: int) -> None:
        if loaded.d2d_enqueue(*arguments, stream):
            raise _refused(loaded, op)

    return enqueue


def workspace_bytes(
    op: str,
    inputs: Sequence[Memory],
    attributes: Mapping[str, int | str],
    outputs: Sequence[Memory],
    *,
    library: Path | None = None,
) -> int:
    """Bytes on the GPU that a `launcher` of the same arguments can use beside the tensors, by whatever tactic."""
    loaded, found = _load(library or library_path()), ctypes.c_size_t()
    given, sources, targets = _attributes(attributes), _tensors(inputs), _tensors(outputs)
    arguments = op.encode(), given, len(given), sources, len(inputs), targets, len(outputs)
    if loaded.d2d_workspace(*arguments, ctypes.byref(found)):
        raise _refused(loaded, op)
    return found.value


def relayout(
    fmt: str, words: np.ndarray, k: int, *, layout: int = KERNEL_ORDER, library: Path | None = None
) -> np.ndarray:
    """Packed interchange words, int32 [N, words(k)] of weight format `fmt`, in a kernels' layout (int32, 2-D).

    Raises Failed for words that do not fit the format and `k`.
    """
    rows, columns = relayout_shape(fmt, words.shape[0], k, layout=layout, library=library)
    expected = by_name(fmt).words(k)
    if words.ndim != 2 or words.shape[1] != expected:
        raise Failed(
            f"relayout to {fmt}: {k} weights are {expected} words a row, not {list(words.shape)}.",
            "Make the checkpoint anew.",
        )
    loaded = _load(library or library_path())
    held, out = np.ascontiguousarray(words, np.int32), np.zeros((rows, columns), np.int32)
    _relayout(loaded, fmt, layout, words.shape[0], k, held, out)
    return out


def relayout_shape(
    fmt: str, n: int, k: int, *, layout: int = KERNEL_ORDER, library: Path | None = None
) -> tuple[int, int]:
    """Shape of what `relayout` gives for weights [n, k]."""
    return _relayout(_load(library or library_path()), fmt, layout, n, k, None, None)


def _relayout(
    loaded, fmt: str, layout: int, n: int, k: int, words: np.ndarray | None, out: np.ndarray | None
) -> tuple[int, int]:
    rows, columns = ctypes.c_int64(), ctypes.c_int64()
    pointers = [None if value is None else value.ctypes.data for value in (words, out)]
    if loaded.d2d_relayout(fmt.encode(), layout, n, k, *pointers, ctypes.byref(rows), ctypes.byref(columns)):
        raise Failed(f"relayout to {fmt}: {_last_error(loaded)}", "Make the checkpoint anew.")
    return rows.value, columns.value


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise Misuse(f"{path}: cannot be loaded: {error}.", "Compile the kernels on this machine.") from None
    for name in ("d2d_describe", "d2d_isas", "d2d_isa_in_use", "d2d_last_error"):
        getattr(loaded, name).restype = ctypes.c_char_p
    many = [ctypes.POINTER(_Tensor), ctypes.c_size_t]
    loaded.d2d_run.argtypes = [
        *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
        *(ctypes.POINTER(_Attribute), ctypes.c_size_t, *many, *many),
    ]
    node = [ctypes.c_char_p, ctypes.POINTER(_Attribute), ctypes.c_size_t, *many, *many]
    loaded.d2d_workspace.argtypes = [*node, ctypes.POINTER(ctypes.c_size_t)]
    loaded.d2d_enqueue.argtypes = [*node, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    loaded.d2d_relayout.argtypes = [
        *(ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64)),
    ]
    return loaded


@functools.cache
def _describe(path: Path) -> list[dict[str, Any]]:
    return json.loads(_load(path).d2d_describe())


def _last_error(loaded: ctypes.CDLL) -> str:
    return (loaded.d2d_last_error() or b"unknown error").decode(errors="replace").rstrip(".") + "."


def _refused(loaded: ctypes.CDLL, op: str) -> Failed:
    message = _last_error(loaded).removeprefix(f"{op}: ")
    return Failed(f"{op}: {message}", "Check attributes, shapes and dtypes of the node.")


def _dtype(port: Mapping[str, Any], attributes: Mapping[str, int | str]) -> np.dtype:
    """Of an output of a node with these attributes."""
    if port["dtype"] != "stream":
        return np.dtype(_DTYPES[port["dtype"]])
    number = attributes.get("dtype", _NUMBERS["float32"])
    if number == _NUMBERS["bfloat16"]:
        import ml_dtypes  # numpy has none of its own

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(np.float16 if number == _NUMBERS["float16"] else np.float32)


def _attributes(attributes: Mapping[str, int | str]) -> ctypes.Array:
    entries = [
        _Attribute(name.encode(), value.encode(), 0)
        if isinstance(value, str)
        else _Attribute(name.encode(), None, value)
        for name, value in attributes.items()
    ]
    return (_Attribute * len(entries))(*entries)


def _in_host_memory(array: np.ndarray) -> Memory:
    return Memory(array.ctypes.data, array.dtype, array.shape)


def _tensors(values: Sequence[Memory]) -> ctypes.Array:
    entries = [
        _Tensor(
            _NUMBERS[value.dtype.name],
            len(value.shape),
            (ctypes.c_int64 * len(value.shape))(*value.shape),
            value.address,
        )
        for value in values
    ]
    return (_Tensor * len(entries))(*entries)
