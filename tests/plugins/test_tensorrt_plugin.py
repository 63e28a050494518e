"""The TensorRT plugins by themselves: through a fake host, and in the registry of a real TensorRT if there is one."""

import importlib.util
import subprocess
import sys

import pytest

from dit2deploy.ops import DOMAIN, OPS, VERSION
from dit2deploy.targets.kernel import library_path
from tests.plugins.compiling import HERE, PLUGINS, compile_cpp

LISTED = [" ".join([op.name, str(VERSION), DOMAIN, *op.attributes]) for op in OPS if op.native]
# The adapter and what it calls; kernels for CPUs stay out.
ADAPTER = (
    "adapters/tensorrt.cc",
    "base/cuda_choice.cc",
    "base/cuda_driver.cc",
    "base/cpu_features.cc",
    "base/scratch.cc",
    "ops/ops.cc",
    "ops/ada_ln_hadamard_quantize/ada_ln_hadamard_quantize.cc",
    "ops/ada_ln_hadamard_quantize/cuda_plan.cc",
    "ops/activation_hadamard_quantize/activation_hadamard_quantize.cc",
    "ops/activation_hadamard_quantize/cuda_plan.cc",
    "ops/hadamard_quantize/hadamard_quantize.cc",
    "ops/hadamard_quantize/cuda_plan.cc",
    "ops/monarch/monarch.cc",
    "ops/monarch/cuda_plan.cc",
    "ops/multi_region_quantize/multi_region_quantize.cc",
    "ops/multi_region_quantize/cuda_plan.cc",
    "ops/quant_gemm/quant_gemm.cc",
    "ops/quant_gemm/layout.cc",
    "ops/quant_gemm/cuda_plan.cc",
    "ops/quant_matmul/quant_matmul.cc",
    "ops/quant_matmul/cuda_plan.cc",
)
FOLDERS = ("abi", "include", "base", "formats", "ops", "ops/quant_gemm", "ops/hadamard_quantize")


def test_the_library_serves_a_host_as_tensorrt_would_use_it(tmp_path):
    host = compile_cpp(tmp_path / "host", [HERE / "fake_host.cc"], "-O1", folders=("abi",))
    done = subprocess.run([host, library_path()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == LISTED
    assert "block must be a power of two" in done.stderr


def test_the_adapter_is_clean_under_sanitizers(tmp_path):
    host = compile_cpp(
        tmp_path / "host",
        [HERE / "fake_host.cc", HERE / "no_cpu_kernels.cc", *(PLUGINS / source for source in ADAPTER)],
        *("-O0", "-g1", "-DLINKED", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        folders=FOLDERS,
    )
    done = subprocess.run([host], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == LISTED


LEAN = """
import sys
import numpy, tensorrt_lean_bindings as trt
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
for found in registry.all_creators:
    if found.plugin_namespace == "dit2deploy":
        print(found.name, found.plugin_version, found.plugin_namespace, *(field.name for field in found.field_names))
creator = registry.get_creator("HadamardQuantize", "1", "dit2deploy")
def make(block):
    field = trt.PluginField("block", numpy.array([block], numpy.int32), trt.PluginFieldType.INT32)
    return creator.create_plugin("node", trt.PluginFieldCollection([field]), trt.TensorRTPhase.BUILD)
made = make(16)  # its interfaces live as long as it does
assert made.get_capability_interface(trt.PluginCapabilityType.CORE).plugin_name == "HadamardQuantize"
assert make(3) is None
"""


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_lean_bindings") is None,
    reason="the registry of the full TensorRT 11: needs `pip install tensorrt-lean==11.4.*`",
)
def test_the_registry_of_the_full_tensorrt_takes_the_library():
    done = subprocess.run([sys.executable, "-c", LEAN, library_path()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == LISTED
