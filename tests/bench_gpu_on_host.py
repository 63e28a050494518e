"""Runs tools/bench_gpu.py at tiny shapes with the emulator behind libcuda.so.1 in place of a GPU.

`python tests/bench_gpu_on_host.py DRIVER OUT [ARGUMENT ..]`: DRIVER is the libcuda.so.1 of plugins/cuda_on_host. What a
machine lacks that has torch and numpy alone cannot be imported here either. $WRONG names an op that gives one wrong
number.
"""

import ctypes
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("pydantic", "onnx", "onnx_ir", "onnxruntime", "diffusers", "transformers", "click", "rich", "safetensors")


class Absent:
    """An import hook: a machine where these packages are not installed."""

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"{name} is not on a bare machine")


def main() -> int:
    driver = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # by its soname this is the library's libcuda.so.1
    sys.meta_path.insert(0, Absent())
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_gpu
    import torch
    from gpu import device, gemm, quantize, step

    class OnHost(device.Device):
        name = "cpu"

        def __init__(self) -> None:
            context = ctypes.c_void_p()
            assert not driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
            assert not driver.cuCtxSetCurrent(context)

        def launcher(self, op, inputs, attributes, outputs, kernels="mma", tactic=0):
            enqueue = super().launcher(op, inputs, attributes, outputs, kernels, tactic)

            def run() -> None:
                enqueue()
                driver.d2d_last_launched.restype = ctypes.c_char_p
                launched = driver.d2d_last_launched()
                assert launched.endswith(b"wgmma") == (kernels == "wgmma")
                if told := os.environ.get("TOLD"):
                    with open(told, "a") as file:
                        file.write(f"{tactic} {launched.decode()}\n")
                if op == os.environ.get("WRONG"):
                    outputs[0].view(-1)[-1] += 1

            return run

        def stream(self) -> int:
            return 4711

        def synchronize(self) -> None:
            driver.d2d_last_stream.restype = ctypes.c_void_p
            assert driver.d2d_last_stream() == 4711

        def times(self, contestants, *, seconds):
            """Runs each once; made-up times, by place."""
            for contestant in contestants:
                contestant.run()
            return {contestant.name: [10.0 + i, 20.0 + i, 15.0 + i] for i, contestant in enumerate(contestants)}

        def hot_times(self, contestants, cold):
            return {contestant.name: min(cold[contestant.name]) for contestant in contestants}

        def captured(self, run):
            return run

        def ceilings(self):
            return device.Ceilings(bytes_a_second=1e12, fp16_a_second=1e14, int8_a_second=2e14)

        def capability(self):
            here = os.environ.get("D2D_HOST_CAPABILITY", "80")
            return f"{here[:-1]}.{here[-1]}"

        def describe(self):
            return {"name": "none"}

    torch.manual_seed(0)
    torch.set_num_threads(1)
    gemm.SHAPES = (gemm.Shape("DiT-XL/2", "fc1", 144, 80), gemm.Shape("FLUX", "fc2", 256, 72))
    gemm.TOKENS = (1, 16, 70)
    quantize.QUANTIZERS = tuple(
        quantize.Quantizer(f"{prefix}HadamardQuantize", "FLUX", k)
        for prefix, k in (("", 96), ("AdaLn", 192), ("Activation", 512), ("GatedActivation", 160))
    )
    quantize.TOKENS = (1, 70)
    step.DIT_XL_2 = step.Geometry("a small DiT", depth=2, hidden=64, heads=2, tokens=9, batch=2)
    return bench_gpu.main(["--out", *sys.argv[2:]], OnHost)


if __name__ == "__main__":
    sys.exit(main())
