"""The calls of the CUDA driver that running an engine takes, by ctypes: no CUDA toolkit, no torch."""

import ctypes
import functools
from collections.abc import Callable

import numpy as np

from dit2deploy.base.errors import Failed, Misuse

_CURE = "Run this on a machine with an NVIDIA GPU and its driver; engines for it can be built on any machine."
_MAJOR, _MINOR = 75, 76  # attributes of a device: its compute capability
_THREAD_LOCAL = 1  # mode of a capture: other threads may go on allocating


def capability() -> str:
    """Compute capability of the first GPU, e.g. "8.6". Raises Misuse where there is no driver or no GPU."""
    driver, device = _driver(), ctypes.c_int()
    check(driver.cuDeviceGet(ctypes.byref(device), 0), "asking for the GPU")
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        check(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device), "asking for its capability")
        numbers.append(str(number.value))
    return ".".join(numbers)


def name() -> str:
    """Of the first GPU, e.g. "NVIDIA H200". Raises Misuse as `capability` does."""
    driver, device, text = _driver(), ctypes.c_int(), ctypes.create_string_buffer(256)
    check(driver.cuDeviceGet(ctypes.byref(device), 0), "asking for the GPU")
    check(driver.cuDeviceGetName(text, len(text), device), "asking for its name")
    return text.value.decode()


def check(status: int, what: str) -> None:
    """Raises Failed for a status that is not success."""
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(status, ctypes.byref(text))
        raise Failed(f"{what}: {(text.value or b'unknown CUDA error').decode()}.", "Look at `nvidia-smi`.")


class Device:
    """The first GPU's primary context, current in this thread, with one stream; `close` gives both back."""

    def __init__(self) -> None:
        self._driver = _driver()
        self._device, self._context, self._stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        check(self._driver.cuDeviceGet(ctypes.byref(self._device), 0), "asking for the GPU")
        check(self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), self._device), "opening the GPU")
        self.use()
        # One that waits for the default stream, where the copies are: from memory that is not pinned they may return
        # before they are done.
        check(self._driver.cuStreamCreate(ctypes.byref(self._stream), 0), "making a stream")

    @property
    def stream(self) -> int:
        return self._stream.value or 0

    def use(self) -> None:
        check(self._driver.cuCtxSetCurrent(self._context), "using the GPU")

    def empty(self, nbytes: int) -> int:
        """Address of new memory on the GPU; one byte at least."""
        address = ctypes.c_uint64()
        check(self._driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(max(1, nbytes))), f"{nbytes} bytes")
        return address.value

    def free(self, address: int) -> None:
        self._driver.cuMemFree_v2(ctypes.c_uint64(address))

    def upload(self, address: int, value: np.ndarray) -> None:
        held = np.ascontiguousarray(value)
        source = ctypes.c_void_p(held.ctypes.data)
        check(
            self._driver.cuMemcpyHtoD_v2(ctypes.c_uint64(address), source, ctypes.c_size_t(held.nbytes)), "copying in"
        )

    def download(self, value: np.ndarray, address: int) -> None:
        target = ctypes.c_void_p(value.ctypes.data)
        check(
            self._driver.cuMemcpyDtoH_v2(target, ctypes.c_uint64(address), ctypes.c_size_t(value.nbytes)), "copying out"
        )

    def wait(self) -> None:
        """Until everything on the stream is done."""
        check(self._driver.cuStreamSynchronize(self._stream), "running the engine")

    def capture(self, enqueue: Callable[[], bool]) -> int:
        """Handle of a graph of what `enqueue` puts on the stream, of which nothing runs meanwhile.

        Raises Failed where `enqueue` gives False or does what cannot be captured, such as allocating.
        """
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        check(self._driver.cuStreamBeginCapture_v2(self._stream, _THREAD_LOCAL), "capturing a step")
        done = False
        try:
            done = enqueue()
        finally:
            status = self._driver.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        check(status, "capturing a step")
        try:
            if not done:
                raise Failed("capturing a step: the engine refused.", "Its reason is above.")
            made = self._driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
            check(made, "making a CUDA graph")
        finally:
            self._driver.cuGraphDestroy(graph)
        return executable.value or 0

    def launch(self, graph: int) -> None:
        check(self._driver.cuGraphLaunch(ctypes.c_void_p(graph), self._stream), "launching a step")

    def forget(self, graph: int) -> None:
        self._driver.cuGraphExecDestroy(ctypes.c_void_p(graph))

    def close(self) -> None:
        if self._context:
            self._driver.cuStreamDestroy_v2(self._stream)
            self._driver.cuDevicePrimaryCtxRelease_v2(self._device)
            self._context = ctypes.c_void_p()


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise Misuse("there is no NVIDIA driver (libcuda.so.1).", _CURE) from None


def _driver() -> ctypes.CDLL:
    """The driver, initialized; Misuse where there is none, or no GPU."""
    library, count = _library(), ctypes.c_int()
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise Misuse("the NVIDIA driver finds no GPU.", _CURE)
    return library
