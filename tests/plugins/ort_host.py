"""A host that drives the custom ops as ONNX Runtime does, without it: the part of its C ABI that our adapter calls."""

import ctypes
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit2deploy.targets import cuda

NUMBERS = {np.dtype(np.float32): 1, np.dtype(np.int8): 3, np.dtype(np.int32): 6, np.dtype(np.float16): 10}
CUDA = "CUDAExecutionProvider"
SLOTS, FAIL = 300, 1
_P, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_OUT = ctypes.POINTER(ctypes.c_void_p)
_DIMS = ctypes.POINTER(ctypes.c_int64)


class Refused(Exception):
    """A status of the library: code and message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Value:
    """A tensor on the device."""

    address: int
    dtype: np.dtype
    shape: tuple[int, ...]


@dataclass
class Node:
    """Kernel info and kernel context at once."""

    attributes: Mapping[str, int | str] = field(default_factory=dict)
    constants: Mapping[int, Value] = field(default_factory=dict)
    inputs: Sequence[Value] = ()
    outputs: dict[int, Value] = field(default_factory=dict)
    dtypes: Sequence[np.dtype] = ()
    stream: int = 0


class _CustomOp(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("functions", ctypes.c_void_p * 25))


class _ApiBase(ctypes.Structure):
    _fields_ = (("get", ctypes.c_void_p), ("version", ctypes.c_void_p))


class OrtHost:
    """The custom ops of a library by name and provider; `device` is where tensors are."""

    def __init__(self, library: Path, device: cuda.Device, *, refused_slots: Sequence[int] = ()) -> None:
        self.device = device
        self._handles, self._objects = itertools.count(1), {}
        self._registered: list[int] = []
        self.scratch: dict[int, int] = {}  # bytes by address, of buffers that nodes have
        self._idle: list[tuple[int, int]] = []  # bytes and address, kept as an arena does
        self.allocators = 0
        self._functions = [self._trap(slot) for slot in range(SLOTS)]
        for slot, function in self._table().items():
            if slot not in refused_slots:
                self._functions[slot] = function
        self._api = (ctypes.c_void_p * SLOTS)(*[ctypes.cast(function, _P).value for function in self._functions])
        # A library serves one runtime a process, and this process may have the real one: a copy is another library.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / library.name
            shutil.copyfile(library, copy)
            self._library = ctypes.CDLL(str(copy))
        self._base_functions = (
            ctypes.CFUNCTYPE(_P, ctypes.c_uint32)(lambda version: ctypes.addressof(self._api)),
            ctypes.CFUNCTYPE(ctypes.c_char_p)(lambda: b"a fake one"),
        )
        base = _ApiBase(*[ctypes.cast(function, _P).value for function in self._base_functions])
        register = self._library.RegisterCustomOps
        register.restype, register.argtypes = _P, (_P, _P)
        self._check(register(1, ctypes.addressof(base)))
        self.ops = {}
        for address in self._registered:
            record = _CustomOp.from_address(address)
            name = self._call(record, 1, ctypes.c_char_p, _P)(address).decode()
            provider = self._call(record, 2, ctypes.c_char_p, _P)(address).decode()
            self.ops[name, provider] = address

    def run(self, *what: Any, **how: Any) -> list[np.ndarray]:
        """Outputs of a node that is made, computed once and destroyed; arguments as of `made`. Raises Refused."""
        with self.made(*what, **how) as (node, compute):
            compute()
            return self.outputs(node)

    @contextmanager
    def made(
        self,
        name: str,
        provider: str,
        attributes: Mapping[str, int | str],
        inputs: Sequence[np.ndarray],
        dtypes: Sequence[np.dtype],
        *,
        constants: Sequence[int] = (),
        stream: int = 0,
    ) -> Iterator[tuple[Node, Callable[[], None]]]:
        """A node and what computes it, into the same memory each time; `constants`: inputs known when it is made."""
        address = self.ops[name, provider]
        record = _CustomOp.from_address(address)
        values = [self._upload(array) for array in inputs]
        node = Node(attributes, {i: values[i] for i in constants}, values, dtypes=dtypes, stream=stream)
        handle, kernel = self._handle(node), ctypes.c_void_p()
        try:
            create = self._call(record, 16, _P, _P, _P, _P, _P)
            self._check(create(address, ctypes.addressof(self._api), handle, ctypes.addressof(kernel)))
            try:
                yield node, lambda: self._check(self._call(record, 17, _P, _P, _P)(kernel, handle))
            finally:
                self._call(record, 8, None, _P)(kernel)
        finally:
            for value in [*values, *node.outputs.values()]:
                self.device.free(value.address)

    def outputs(self, node: Node) -> list[np.ndarray]:
        self.device.wait()
        return [self._download(node.outputs[index]) for index in range(len(node.dtypes))]

    def _upload(self, array: np.ndarray) -> Value:
        value = Value(self.device.empty(array.nbytes), array.dtype, array.shape)
        self.device.upload(value.address, array)
        return value

    def _download(self, value: Value) -> np.ndarray:
        array = np.empty(value.shape, value.dtype)
        self.device.download(array, value.address)
        return array

    @staticmethod
    def _call(record: _CustomOp, index: int, result: Any, *arguments: Any) -> Any:
        return ctypes.CFUNCTYPE(result, *arguments)(record.functions[index])

    def _handle(self, thing: Any) -> int:
        handle = next(self._handles)
        self._objects[handle] = thing
        return handle

    def _check(self, status: int | None) -> None:
        if status:
            raise self._objects.pop(status)

    def _trap(self, slot: int):
        return ctypes.CFUNCTYPE(_P)(lambda: self._handle(Refused(FAIL, f"slot {slot} refuses")))

    def _take(self, bytes_: int) -> int:
        """The address of a scratch buffer: one that was given back, or memory of the device."""
        found = next((entry for entry in self._idle if entry[0] == bytes_), None)
        if found:
            self._idle.remove(found)
        address = found[1] if found else self.device.empty(bytes_)
        self.scratch[address] = bytes_
        return address

    def _give_back(self, address: int) -> None:
        self._idle.append((self.scratch.pop(address), address))

    def _allocator(self) -> int:
        self.allocators += 1
        return self._handle(self)

    def _release_allocator(self, allocator: int) -> None:
        assert self._objects.pop(allocator) is self
        self.allocators -= 1

    def _table(self) -> dict[int, Any]:
        """Functions by slot; those that return a status give None for success."""
        of = self._objects.__getitem__

        def put(out, value) -> None:
            out[0] = value

        def attribute(kind: type):
            def read(info: int, name: bytes, out) -> int | None:
                value = of(info).attributes.get(name.decode())
                if not isinstance(value, kind):
                    return self._handle(Refused(FAIL, "no such attribute"))
                out[0] = value
                return None

            return read

        def text(info: int, name: bytes, out: int | None, size) -> int | None:
            value = of(info).attributes.get(name.decode())
            if not isinstance(value, str):
                return self._handle(Refused(FAIL, "no such attribute"))
            size[0] = len(value.encode()) + 1
            if out:
                ctypes.memmove(out, value.encode() + b"\0", size[0])
            return None

        def dimensions(info: int, dims, rank: int) -> None:
            for index, size in enumerate(of(info).shape[:rank]):
                dims[index] = size

        def output(context: int, index: int, dims, rank: int, out) -> None:
            node = of(context)
            shape, dtype = tuple(dims[:rank]), node.dtypes[index]
            if index not in node.outputs:
                node.outputs[index] = Value(self.device.empty(int(np.prod(shape)) * dtype.itemsize), dtype, shape)
            put(out, self._handle(node.outputs[index]))

        def constant(info: int, index: int, known, out) -> None:
            value = of(info).constants.get(index)
            known[0] = value is not None
            put(out, self._handle(value) if value is not None else None)

        functions = {
            0: ((_INT, ctypes.c_char_p), lambda code, message: self._handle(Refused(code, message.decode()))),
            26: ((ctypes.c_char_p, _OUT), lambda name, out: put(out, self._handle(name))),
            27: ((_P, _P), lambda domain, op: self._registered.append(op)),
            28: ((_P, _P), lambda options, domain: None),
            51: ((_P, _OUT), lambda value, out: put(out, of(value).address)),
            60: ((_P, ctypes.POINTER(_INT)), lambda info, out: put(out, NUMBERS.get(of(info).dtype, 11))),
            61: ((_P, ctypes.POINTER(_SIZE)), lambda info, out: put(out, len(of(info).shape))),
            62: ((_P, _DIMS, _SIZE), dimensions),
            65: ((_P, _OUT), lambda value, out: put(out, self._handle(of(value)))),
            76: ((_P, _P), lambda allocator, address: of(allocator)._give_back(address)),
            77: ((_P, _OUT), lambda allocator, out: put(out, allocator)),
            85: ((_P, ctypes.c_char_p, ctypes.POINTER(ctypes.c_float)), attribute(float)),
            86: ((_P, ctypes.c_char_p, _DIMS), attribute(int)),
            87: ((_P, ctypes.c_char_p, _P, ctypes.POINTER(_SIZE)), text),
            88: ((_P, ctypes.POINTER(_SIZE)), lambda context, out: put(out, len(of(context).inputs))),
            90: ((_P, _SIZE, _OUT), lambda context, i, out: put(out, self._handle(of(context).inputs[i]))),
            91: ((_P, _SIZE, _DIMS, _SIZE, _OUT), output),
            93: ((_P,), lambda status: put({}, self._objects.pop(status))),
            99: ((_P,), lambda info: put({}, self._objects.pop(info))),
            132: ((_P,), self._release_allocator),
            193: ((_P, _OUT), lambda context, out: put(out, of(context).stream)),
            249: ((_P, _SIZE, ctypes.POINTER(_INT), _OUT), constant),
            277: ((_P, _P, _SIZE, _OUT), lambda context, where, size, out: put(out, of(where)._take(size))),
            278: ((_P, _INT, _OUT), lambda info, memory, out: put(out, self._allocator())),
        }
        return {slot: ctypes.CFUNCTYPE(_P, *types)(function) for slot, (types, function) in functions.items()}
