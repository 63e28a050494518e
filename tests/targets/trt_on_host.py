"""A TensorRT whose engine is one node of ours, on the emulated driver: run by test_trt_runner.py in a process.

Checks what the runner gives and prints what it enqueued, refused and noted.

    trt_on_host.py CASE [CACHE]    CACHE: a TensorRT-RTX, whose compiled kernels lie in that file
"""

import ctypes
import enum
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dit2deploy.artefacts.onnx_model import AxisRecord, PortRecord
from dit2deploy.base.errors import Dit2DeployError
from dit2deploy.base.progress import listen
from dit2deploy.targets import kernel
from dit2deploy.targets.trt_profile import check_inputs
from dit2deploy.targets.trt_runner import TensorRtRunner

DRIVER = ctypes.CDLL("libcuda.so.1")
PORTS = {"x": np.float32, "qmax": np.float32, "q": np.int8, "s": np.float32}
USER_MANAGED, SCRATCH = 2, 4096  # bytes for each row
ENQUEUED: list[str] = []
TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")


class Context:
    """HadamardQuantize with blocks of 8: tensors and their addresses, enqueued by the library's own entry."""

    def __init__(self, allocates: bool, compile) -> None:
        self.allocates, self.compile = allocates, compile
        self.shapes, self.addresses, self.memory = {}, {}, 0

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return shape[-1] % 8 == 0 or name != "x"

    def get_tensor_shape(self, name):
        x = self.shapes["x"]
        return x if name == "q" else (*x[:-1], 1)

    def update_device_memory_size_for_shapes(self):
        return self.shapes["x"][0] * SCRATCH

    def set_device_memory(self, address, size):
        assert size == self.shapes["x"][0] * SCRATCH
        self.memory = address

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        ENQUEUED.append(str(self.shapes["x"][0]))
        self.compile(self.shapes["x"][0])
        if self.allocates and DRIVER.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(1)):
            return False
        assert self.memory and self.memory not in self.addresses.values()
        memory = {
            name: kernel.Memory(
                address,
                np.dtype(PORTS[name]),
                self.shapes[name] if name in self.shapes else self.get_tensor_shape(name),
            )
            for name, address in self.addresses.items()
        }
        attributes = {"block": 8, "clip": "absmax"}
        inputs, outputs = [memory["x"], memory["qmax"]], [memory["q"], memory["s"]]
        kernel.launcher("HadamardQuantize", inputs, attributes, outputs)(stream)
        return True


class RuntimeCache:
    """Of one driver: what it serialized itself it takes back, nothing else."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def deserialize(self, blob) -> bool:
        current = ctypes.c_void_p()
        assert not DRIVER.cuCtxGetCurrent(ctypes.byref(current)) and current.value, "no context is current"
        driver, *compiled = bytes(blob).decode().split()
        if driver != "driver-1":
            return False
        self.compiled = compiled
        return True

    def serialize(self):
        return memoryview(" ".join(["driver-1", *self.compiled]).encode())


class RuntimeConfig:
    """What TensorRT-RTX makes contexts with; kernels that its cache lacks are compiled, and told."""

    def __init__(self) -> None:
        self.strategy = self.cache = None

    def set_execution_context_allocation_strategy(self, strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache) -> bool:
        self.cache = cache
        return True

    def compile(self, rows: int) -> None:
        if str(rows) not in self.cache.compiled:
            print("compiled:", rows)
            self.cache.compiled.append(str(rows))


def execution_context(allocates: bool, made_with) -> Context | None:
    """Made with a strategy, or with a config that tells it."""
    is_rtx = isinstance(made_with, RuntimeConfig)
    strategy, compile = (made_with.strategy, made_with.compile) if is_rtx else (made_with, lambda rows: None)
    return Context(allocates, compile) if strategy == USER_MANAGED else None


def engine(allocates: bool) -> SimpleNamespace:
    return SimpleNamespace(
        num_io_tensors=len(PORTS),
        get_tensor_name=list(PORTS).__getitem__,
        get_tensor_mode=lambda name: TensorIOMode.INPUT if name in ("x", "qmax") else TensorIOMode.OUTPUT,
        get_tensor_dtype=PORTS.__getitem__,
        create_runtime_config=RuntimeConfig,
        create_execution_context=lambda made_with: execution_context(allocates, made_with),
    )


def main(case: str, cache: str | None = None) -> None:
    made = engine(allocates=case == "allocates")
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: made)
    trt = SimpleNamespace(
        get_plugin_registry=lambda: SimpleNamespace(get_creator=lambda *key: object()),
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Runtime=lambda log: runtime,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=USER_MANAGED),
        TensorIOMode=TensorIOMode,
        nptype=lambda dtype: dtype,
    )
    listen(lambda what, done, total: print("note:", what) if total == 0 else None)
    profile = {"rows": AxisRecord(name="rows", least=1, usual=1, most=2)}
    ports = [
        PortRecord(name="x", dtype="float32", shape=("rows", 8)),
        PortRecord(name="qmax", dtype="float32", shape=(1,)),
    ]
    check = partial(check_inputs, profile, ports)
    compiled = Path(cache) if cache else None
    runner = TensorRtRunner(trt, Path(__file__), kernel.library_path(), check, compiled=compiled)
    qmax = np.ones(1, np.float32)
    for rows, value, levels in ((1, 1, 1), (1, 2, 1), (1, -3, 7), (2, 4, 1), (1, 5, 1), (2, 6, 3), (2, 7, 1)):
        x = np.full((rows, 8), value, np.float32)
        got = runner.run({"x": x, "qmax": levels * qmax})
        step = np.float32(np.sqrt(8) * abs(value) / levels)
        assert got["q"].shape == x.shape and got["s"].shape == (rows, 1), got
        assert (got["q"][:, 0] == levels * np.sign(value)).all() and not got["q"][:, 1:].any(), got
        np.testing.assert_allclose(got["s"], step, rtol=1e-6)
    for shape in ((1, 9), (3, 8)):
        try:
            runner.run({"x": np.ones(shape, np.float32), "qmax": qmax})
        except Dit2DeployError as error:
            print("refused:", error.cause, error.cure)
    runner.close()
    print("enqueued:", *ENQUEUED)


if __name__ == "__main__":
    main(*sys.argv[1:])
