"""The TensorRT plugins by themselves: through a fake host, and in the registry of a real TensorRT if there is one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit2deploy.ops import DOMAIN, OPS, VERSION
from dit2deploy.targets.kernel import library_path
from dit2deploy.targets.trt_build import environment
from tests.plugins.compiling import HERE, PLUGINS, compile_cpp

LISTED = [" ".join([op.name, str(VERSION), DOMAIN, *op.attributes]) for op in OPS if op.native]
# The adapter and what it calls; kernels for CPUs stay out.
ADAPTER = (
    "adapters/tensorrt.cc",
    "adapters/tensorrt_log.cc",
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


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Path:
    return compile_cpp(tmp_path_factory.mktemp("host") / "host", [HERE / "fake_host.cc"], "-O1", folders=("abi",))


@pytest.mark.parametrize("kernels", ("mma", "wgmma"))
def test_the_library_serves_a_host_as_tensorrt_would_use_it(host, kernels: str):
    environment = {**os.environ, "DIT2DEPLOY_CUDA": kernels}
    done = subprocess.run([host, library_path()], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == LISTED
    assert "block must be a power of two" in done.stderr
    assert "TernaryGemm node: there is no tactic 7: known are 0, the op's rule, and 1 to 6" in done.stderr
    assert "HadamardQuantize node: there is no tactic 1: known are 0, the op's rule, alone" in done.stderr


def test_the_tactic_that_tensorrt_chose_is_computed(driver, host):
    """On the emulated driver: by every tactic, with the workspace that was asked for, the same bits."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver.parent)}
    command = [host, library_path(), "gpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


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


# Folders with NvInferRuntime.h: those that the variable names, and where Debian's and JetPack's packages put it.
NAMED = os.environ.get("D2D_TENSORRT_HEADERS", "")
HEADERS = [
    folder
    for folder in (*NAMED.split(os.pathsep), *map(str, Path("/usr/include").glob("*-linux-gnu")))
    if folder and Path(folder, "NvInferRuntime.h").is_file()
]
# What they ask of CUDA.
CUDA = """#pragma once
typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
"""


@pytest.mark.skipif(not HEADERS, reason="$D2D_TENSORRT_HEADERS names no folder with TensorRT's headers")
@pytest.mark.parametrize("folder", HEADERS)
def test_our_declarations_are_those_of_the_sdk(folder, tmp_path):
    """Ran with the headers of 10.0.1, 10.3.0, 10.10.0, 10.16 and 11.1 (2026-11-22)."""
    (tmp_path / "cuda_runtime_api.h").write_text(CUDA)
    sdk = ("-isystem", folder, "-isystem", str(tmp_path))
    probe = [HERE / "tensorrt_abi.cc"]
    printed = [
        subprocess.run([program], capture_output=True, text=True, check=True).stdout
        for program in (
            compile_cpp(tmp_path / "ours", probe, "-w", folders=("abi",)),
            compile_cpp(tmp_path / "theirs", probe, "-w", "-DOFFICIAL", *sdk),
        )
    ]
    assert printed[0] == printed[1] and "IPluginV3OneRuntime::enqueue" in printed[0]
    adapter = [PLUGINS / "adapters" / "tensorrt.cc"]
    compile_cpp(
        tmp_path / "adapter.o",
        adapter,
        "-c",
        "-DD2D_TENSORRT_SDK",
        "-Wno-deprecated-declarations",
        *sdk,
        folders=FOLDERS[1:],
    )


LEAN = """
import sys
import numpy, tensorrt_lean_bindings as trt
registry = trt.get_plugin_registry()
print(trt.__version__)
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


@pytest.mark.parametrize("variable", ["D2D_LEAN_TENSORRT_10", "D2D_LEAN_TENSORRT_11"])
def test_the_registry_of_the_full_tensorrt_takes_the_library(variable):
    """The lean runtime has the registry of the full TensorRT, and builds nothing."""
    folder = os.environ.get(variable)
    if not folder or not (Path(folder) / "tensorrt_lean_bindings").is_dir():
        pytest.skip(f"${variable} names no folder with tensorrt-lean (pip install --target)")
    done = subprocess.run(
        [sys.executable, "-c", LEAN, library_path()],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": folder},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    version, *listed = done.stdout.splitlines()
    assert version.startswith(f"{variable.rpartition('_')[2]}.") and listed == LISTED
    assert "dit2deploy: HadamardQuantize node: block must be a power of two" in done.stderr


LOGGED = """
import sys
import numpy, tensorrt_rtx as trt
class Log(trt.ILogger):
    def log(self, severity, message):
        if severity == trt.ILogger.Severity.ERROR:
            print(message)
builder = trt.Builder(Log())
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
creator = registry.get_creator("HadamardQuantize", "1", "dit2deploy")
field = trt.PluginField("block", numpy.array([3], numpy.int32), trt.PluginFieldType.INT32)
collection = trt.PluginFieldCollection([field])
assert creator.create_plugin("blocks.3.attn", collection, trt.TensorRTPhase.BUILD) is None
"""


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_faults_reach_the_logger_with_the_name_of_the_layer(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LOGGED, library_path()],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment("tensorrt_rtx", tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dit2deploy: HadamardQuantize blocks.3.attn: block must be a power of two" in done.stdout
    assert "block must be" not in done.stderr
