"""Files that are whole or absent: atomic writes, hashes, JSON, safetensors one tensor at a time."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from dit2deploy.base.disk import reason, sweep, temporary_name, writing
from dit2deploy.base.errors import Misuse

# safetensors writes these names; bfloat16 has no numpy dtype of its own and is read as its float32 value.
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Known by name and size; what they hold is not read: no full-precision model has them.
_OTHERS = {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
_SIZES = {name: np.dtype(dtype).itemsize for name, dtype in _DTYPES.items()} | _OTHERS
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items() if name != "BF16"}
_CHUNK = 1 << 20  # numbers that are widened at once
_STORED_AS = "dit2deploy.stored_as"  # entry of the metadata: names of tensors, and of the equal ones that are stored
_SHARED = 1024  # bytes: of smaller tensors the name takes as much
_LARGEST_HEADER = 100 * 1024 * 1024


@contextmanager
def whole_file(path: Path, *, size: int | None = None) -> Iterator[Path]:
    """Yields a temporary name beside `path` that becomes `path` when the block ends well, and vanishes otherwise.

    `size`: bytes that will be written, where they are known: Misuse before the first where the disk has less.
    """
    with writing(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        temporary = temporary_name(path)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, replaces: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the block ends well, and vanishes otherwise.

    What is at `path` is replaced where it is an empty folder, or one of which `replaces` says that it holds what is
    written here; Misuse for any other, which would be lost.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not _is_empty(path) and not (replaces is not None and replaces(path)):
        raise Misuse(
            f"{path}: is not empty and holds something else than what is written here.",
            "Choose another place, or empty it yourself.",
        )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        temporary, old = temporary_name(path), temporary_name(path, "old")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)
            shutil.rmtree(temporary, ignore_errors=True)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def write_bytes(path: Path, content: bytes) -> None:
    with whole_file(path, size=len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=False) + "\n").encode())


def read_json(path: Path, *, cure: str = "") -> Any:
    """The parsed file; Misuse where it is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Misuse(f"{path}: no such file.", cure) from None
    except OSError as error:
        raise Misuse(f"{path}: cannot be read: {reason(error)}.", cure) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Misuse(f"{path}: is not JSON: {error}.", cure) from None


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_folder(path: Path, *, skip: tuple[str, ...] = ()) -> str:
    """Hash over names and contents of all files below `path`; names that start with a dot and `skip` are left out."""
    parts = {
        str(file.relative_to(path)): sha256_of_file(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.name.startswith(".") and file.name not in skip
    }
    return sha256_of_json(parts)


def inside(folder: Path, name: str) -> Path:
    """`folder / name`; Misuse where `name` leads out of the folder (artefacts are not trusted).

    By the name alone: the files of the Hub's cache are links to where their contents lie, outside of the folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        raise Misuse(f"{folder}: the file name {name!r} leads out of the folder.", "Do not use this artefact.")
    return folder / name


class TensorFile:
    """A safetensors file whose tensors are read one at a time, when they are asked for.

    Tensors that `write_distinct_tensors` left out are there as all others: `stored_as` tells of which they are copies.
    Raises Misuse for a file that is missing, truncated or malformed.
    """

    def __init__(self, path: Path, *, cure: str = "Fetch or make the file again.") -> None:
        self.path = path
        self._cure = cure
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                prefix = file.read(8)
                length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
                if not 0 < length <= min(size - 8, _LARGEST_HEADER):
                    raise Misuse(f"{path}: is truncated or no safetensors file ({size} bytes).", cure)
                header = json.loads(file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._entries = {name: self._entry(name, value, size - 8 - length) for name, value in header.items()}
            self.stored_as = _parse_stored_as(self.metadata, self._entries)
            self._entries |= {name: self._entries[stored] for name, stored in self.stored_as.items()}
        except FileNotFoundError:
            raise Misuse(f"{path}: no such file.", cure) from None
        except OSError as error:
            raise Misuse(f"{path}: cannot be read: {reason(error)}.", cure) from None
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise Misuse(f"{path}: its safetensors header is broken ({error}).", cure) from None
        self._start = 8 + length

    def _entry(self, name: str, value: dict, size: int) -> tuple[str, tuple[int, ...], int]:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if dtype not in _SIZES:
            raise Misuse(f"{self.path}: tensor {name!r} has the unknown dtype {dtype!r}.", self._cure)
        expected = int(np.prod(shape, dtype=np.int64)) * _SIZES[dtype]
        if any(dim < 0 for dim in shape) or end - begin != expected or not 0 <= begin <= end <= size:
            raise Misuse(f"{self.path}: tensor {name!r} is truncated or its header lies.", self._cure)
        return dtype, shape, begin

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype, e.g. "F16"."""
        return self._entries[name][0]

    def nbytes(self, name: str) -> int:
        """Of the tensor as `read` gives it."""
        size = 4 if self.dtype(name) == "BF16" else _SIZES[self.dtype(name)]
        return size * int(np.prod(self.shape(name), dtype=np.int64))

    def read(self, name: str) -> np.ndarray:
        """A copy of the tensor; bfloat16 comes back as float32."""
        return self._read(name, self._entry_of(name)[1], 0)

    def read_entry(self, name: str, index: int) -> np.ndarray:
        """A copy of `tensor[index]`; nothing else of it is read."""
        shape = self._entry_of(name)[1]
        if not 0 <= index < shape[0]:
            raise IndexError(f"{name} has {shape[0]} entries, not {index + 1}")
        return self._read(name, shape[1:], index)

    def _entry_of(self, name: str) -> tuple[str, tuple[int, ...], int]:
        if name not in self._entries:
            raise Misuse(f"{self.path}: there is no tensor {name!r}.", self._cure)
        return self._entries[name]

    def _read(self, name: str, shape: tuple[int, ...], index: int) -> np.ndarray:
        """The part of this shape that begins after `index` parts of its size."""
        dtype, _, begin = self._entries[name]
        if dtype in _OTHERS:
            raise Misuse(f"{self.path}: tensor {name!r} is {dtype}, which is not read here.", "Give float weights.")
        count = int(np.prod(shape, dtype=np.int64))
        with open(self.path, "rb") as file:
            file.seek(self._start + begin + index * count * _SIZES[dtype])
            if dtype != "BF16":
                return np.fromfile(file, _DTYPES[dtype], count).reshape(shape)
            values = np.empty(count, np.uint32)
            for at in range(0, count, _CHUNK):
                part = values[at : at + _CHUNK]
                np.left_shift(np.fromfile(file, np.uint16, len(part)), 16, out=part, dtype=np.uint32)
        return values.view(np.float32).reshape(shape)


def _parse_stored_as(metadata: Mapping[str, str], stored: Container[str]) -> dict[str, str]:
    """Tensors that a safetensors file leaves out -> the equal ones that it stores.

    Raises ValueError for a table that is none, that names what is not stored, or that names what is.
    """
    table = json.loads(metadata.get(_STORED_AS, "{}"))
    if not isinstance(table, dict):
        raise ValueError(f"{_STORED_AS} is no table")
    for name, other in table.items():
        if not isinstance(other, str) or other not in stored:
            raise ValueError(f"{name!r} is said to be stored as {other!r}, which is not there")
        if name in stored:
            raise ValueError(f"{name!r} is there, and is said to be stored as {other!r}")
    return table


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file in the order given, one tensor in memory at a time beside those passed in."""
    _write(path, tensors, {name: _described(value) for name, value in tensors.items()}, metadata or {})


def write_distinct_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """As `write_tensors`, but of tensors of equal dtype, shape and contents the first alone, and in the metadata the
    names of the others: safetensors itself knows no tensor of two names."""
    first: dict[tuple, str] = {}
    described, stored_as = {}, {}
    for name, value in tensors.items():
        told = _described(value)
        same = name if value.nbytes < _SHARED else first.setdefault((*told, _digest(value)), name)
        if same == name:
            described[name] = told
        else:
            stored_as[name] = same
    _write(path, tensors, described, {_STORED_AS: json.dumps(stored_as)} if stored_as else {})


def _digest(value: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(value).data.cast("B")).digest()


def _described(value: np.ndarray) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and bytes."""
    return _NAMES[value.dtype], value.shape, value.nbytes


def _write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    described: Mapping[str, tuple[str, tuple[int, ...], int]],
    metadata: Mapping[str, str],
) -> None:
    """Writes those of the tensors that are described."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape, size) in described.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path, size=8 + len(text) + offset) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in described:
            value = tensors[name]
            file.write(np.ascontiguousarray(value).data.cast("B") if value.size else b"")
