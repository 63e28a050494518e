"""The custom ops of ONNX Runtime's CUDA provider, through a fake host and the emulated driver; what they compute is
tests/ops/test_numerics.py's face "cuda-custom-op"."""

import os
import subprocess
import sys
from pathlib import Path

from dit2deploy.targets import kernel

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import ctypes
import numpy as np
from dit2deploy.targets import cuda, kernel
from tests.plugins.ort_host import CUDA, OrtHost, Refused
device = cuda.Device()
driver = ctypes.CDLL("libcuda.so.1")
x, qmax = np.ones((3, 8), np.float32), np.ones(1, np.float32)
CODES, STEPS = np.dtype(np.int8), np.dtype(np.float32)
def host(**options): return OrtHost(kernel.library_path(), device, **options)
def quantize(host, *inputs, block=8, stream=0, constants=()):
    inputs = inputs or (x, qmax)
    attributes = {"block": block, "clip": "absmax"}
    return host.run("HadamardQuantize", CUDA, attributes, inputs, [CODES, STEPS], stream=stream, constants=constants)
def told(what):
    try:
        what()
    except Refused as error:
        print(error.code, error)
"""


def run(driver: Path, code: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(driver.parent)}
    done = subprocess.run([sys.executable, "-c", BEGIN + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_every_op_is_there_for_both_providers(driver):
    names = {entry["name"] for entry in kernel.describe()}
    found = run(driver, "print(*(f'{name}/{provider}' for name, provider in host().ops), sep='\\n')")
    expected = [f"{name}/{p}ExecutionProvider" for name in names for p in ("CPU", "CUDA")]
    assert sorted(found) == sorted(expected + [f"{name}Float16/CUDAExecutionProvider" for name in names])


def test_a_node_computes_on_the_stream_of_the_context(driver):
    code = """
q, s = quantize(host(), stream=77)
driver.d2d_last_stream.restype = ctypes.c_void_p
print(driver.d2d_last_stream(), *q[2], *s[2])
print(*quantize(host(), np.ones((0, 8), np.float32), qmax)[0].shape)
"""
    assert run(driver, code) == ["77 1 0 0 0 0 0 0 0 2.828427", "0 8"]


def test_a_node_of_halves_has_a_name_of_its_own(driver):
    code = """
served, half = host(), np.dtype(np.float16)
q, s = served.run("HadamardQuantizeFloat16", CUDA, {"block": 8, "dtype": 10}, (x.astype(half), qmax), [CODES, STEPS])
print(q.dtype, *q[2], s.dtype, *s[2])
gemm = q, s, np.zeros((5, 2), np.int32), np.ones((5, 1), np.float32), np.full(5, 1 / 3, np.float32)
(y,) = served.run("Int8GemmFloat16", CUDA, {"dtype": 10}, gemm, [half])
print(y.dtype, *(y[2] == (np.float32(-128) * s[2] + np.float32(1 / 3)).astype(half)))
told(lambda: served.run("Int8GemmFloat16", CUDA, {}, gemm, [half]))
told(lambda: served.run("Int8Gemm", CUDA, {"dtype": 16}, gemm, [half]))
told(lambda: served.run("HadamardQuantizeFloat16", CUDA, {"dtype": 10}, (x, qmax), [CODES, STEPS]))
"""
    assert run(driver, code) == [
        "int8 1 0 0 0 0 0 0 0 float32 2.828427",
        "float16 True True True True True",
        "2 Int8Gemm: dtype is 1, which is no type of ONNX Runtime's op Int8GemmFloat16 on this provider",
        "2 Int8Gemm: dtype is 16, which is no type of ONNX Runtime's op Int8Gemm on this provider",
        "2 HadamardQuantize: input x has the element type 1",
    ]


def test_a_node_allocates_copies_and_waits_for_nothing(driver):
    """All of which the driver refuses while a stream is captured; the graph then reads what the inputs hold."""
    code = """
served, stream = host(), ctypes.c_void_p(device.stream)
made = served.made("HadamardQuantize", CUDA, {"block": 8}, (x, qmax), [CODES, STEPS], stream=device.stream)
with made as (node, compute):
    compute()
    assert not driver.cuStreamBeginCapture_v2(stream, 1)
    print(driver.cuCtxSynchronize() != 0)
    compute()
    graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
    assert not driver.cuStreamEndCapture(stream, ctypes.byref(graph))
    assert not driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    device.upload(node.inputs[0].address, -3 * x)
    print(*served.outputs(node)[1][2])
    assert not driver.cuGraphLaunch(executable, stream)
    q, s = served.outputs(node)
    print(*q[2], *s[2])
"""
    assert run(driver, code) == ["True", "2.828427", "-1 0 0 0 0 0 0 0 8.485281"]


GEMM = """
m, n, k = 70, 34, 64 * 64
rng = np.random.default_rng(0)
q = rng.integers(-127, 127, (m, k), endpoint=True).astype(np.int8)
s, w = np.full((m, 1), 0.01, np.float32), rng.integers(-2**31, 2**31, (2, k // 64 * 128)).astype(np.int32)
gemm = q, s, w, np.ones((n, 1), np.float32), np.zeros(n, np.float32)
attributes, half = {"layout": 2, "dtype": 10}, [np.dtype(np.float16)]
driver.d2d_last_launched.restype = ctypes.c_char_p
def product(host, stream): return host.run("TernaryGemmFloat16", CUDA, attributes, gemm, half, stream=stream)[0]
"""


def test_a_split_k_has_its_sums_in_a_scratch_buffer(driver):
    """It is given back once the node is enqueued; where the node has no stream, ONNX Runtime has no buffer either."""
    code = """
served, stream = host(), ctypes.c_void_p(device.stream)
whole = product(served, 0)
print(driver.d2d_last_launched().decode(), served.scratch, served._idle)
made = served.made("TernaryGemmFloat16", CUDA, attributes, gemm, half, stream=device.stream)
with made as (node, compute):
    compute()
    print(driver.d2d_last_launched().decode(), served.scratch, served._idle[0][0] == 4 * m * n, served.allocators)
    assert not driver.cuStreamBeginCapture_v2(stream, 1)
    compute()
    graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
    assert not driver.cuStreamEndCapture(stream, ctypes.byref(graph))
    assert not driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    device.upload(node.outputs[0].address, np.zeros((m, n), np.float16))
    assert not driver.cuGraphLaunch(executable, stream)
    print(np.array_equal(served.outputs(node)[0], whole), bool(whole.any()))
print(served.allocators)
for slot in (77, 277, 278):
    told(lambda: product(host(refused_slots=[slot]), device.stream))
"""
    assert run(driver, GEMM + code) == [
        "ternary_gemm_64x64 {} []",
        "gemm_finish {} True 1",
        "True True",
        "0",
        *(f"1 slot {slot} refuses" for slot in (77, 277, 278)),
    ]


def test_what_is_wrong_comes_back_as_a_status(driver):
    code = """
served = host()
told(lambda: quantize(served, block=24))
told(lambda: quantize(served, block=16))
told(lambda: quantize(served, x, np.ones(2, np.float32), constants=[1]))
told(lambda: quantize(served, x.astype(np.int32), qmax))
told(lambda: quantize(served, x))
told(lambda: quantize(host(refused_slots=[193])))
"""
    assert run(driver, code) == [
        "2 HadamardQuantize: block must be a power of two from 1 to 32768, got 24",
        "2 HadamardQuantize: block 16 does not divide the 8 columns of x",
        "2 HadamardQuantize: qmax has 2 values, which do not divide the 3 rows of x",
        "2 HadamardQuantize: input x has the element type 6",
        "2 HadamardQuantize: has 1 inputs, expects 2",
        "1 slot 193 refuses",
    ]


def test_a_failing_driver_comes_back_as_a_status(driver):
    code = """
served = host()
driver.cuCtxSetCurrent(None)
told(lambda: quantize(served))
"""
    assert run(driver, code) == ["1 HadamardQuantize: no CUDA context is current"]
