"""Builds TensorRT engines in a child process and looks at what came out: what tensorrt-rtx and tensorrt share."""

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dit2deploy.artefacts.bundle import TargetRecord
from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.base.disk import scratch_folder
from dit2deploy.base.errors import Dit2DeployError, Failed, Misuse
from dit2deploy.base.machine import versions
from dit2deploy.targets import kernel
from dit2deploy.targets.graph import DOMAIN, W, is_gemm, save_streamed, tell_slow_gemms, use_kernel_layout
from dit2deploy.targets.half_matmul import with_half_matmuls
from dit2deploy.targets.trt_engine import found_once, inspect_engine

BATCH = (1, 2, 16)  # least, usual, most: the one profile of every engine
TIMEOUT = 3600  # seconds; a model of 12 billion parameters takes minutes
FLOAT32, HALF = "float32", "float32, matrix products and convolutions of the float parts in float16"


@dataclass(frozen=True)
class Plan:
    """One engine: its label, the compute capabilities that it is for (none: the GPU at hand), and its float parts."""

    label: str
    capabilities: tuple[str, ...]
    floats: str = FLOAT32


def build_engines(
    onnx: OnnxModel, *, root: Path, target: str, module: str, package: str, plans: Sequence[Plan]
) -> TargetRecord:
    """Writes `root / target / LABEL.engine` for each plan and the plugin library beside them; tells what they hold.

    Raises Misuse for a model that is not of the fused form, Failed where TensorRT builds nothing or drops the plugins.
    """
    check_model(onnx, target)
    folder = root / target
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / kernel.LIBRARY_NAME
    shutil.copyfile(kernel.library_path(), library)
    paths = [folder / f"{plan.label}.engine" for plan in plans]
    with scratch_folder() as scratch:
        source = _with_kernel_weights(onnx.path, scratch / "weights")
        job = {
            "module": module,
            "library": str(library.resolve()),
            "batch": BATCH,
            "engines": [
                {
                    "onnx": str(_source(source, plan, Path(scratch))),
                    "engine": str(path.resolve()),
                    "capabilities": plan.capabilities,
                }
                for plan, path in zip(plans, paths, strict=True)
            ],
        }
        answer = run_child(job, environment(module, Path(scratch)), package=package)
        model = ir.load(source)
        tell_slow_gemms(model, target)
        made = {
            plan.label: _details(model, onnx, plan, path, told, module=module)
            for plan, path, told in zip(plans, paths, answer["engines"], strict=True)
        }
    return TargetRecord(
        engines={plan.label: str(path.relative_to(root)) for plan, path in zip(plans, paths, strict=True)},
        files=tuple(str(path.relative_to(root)) for path in (*paths, library)),
        # A device holds one of them.
        weight_bytes=max(told["bytes"] for told in answer["engines"]),
        details={
            "engines": made,
            "batch": list(BATCH),
            "library_bytes": library.stat().st_size,
            "layout": kernel.FRAGMENT_ORDER,
            "peak_rss_mb": answer["peak_rss_mb"],
            "not_run": "The engines were built and inspected here, not run; running them takes an NVIDIA GPU.",
        },
        versions=versions("onnx-ir", package),
    )


def check_model(onnx: OnnxModel, target: str) -> None:
    """Raises Misuse for a model that TensorRT's plugins have no place in, or whose dynamic axes are not the batch."""
    if onnx.manifest.form != "fused":
        raise Misuse(
            f"{onnx.folder}: target {target} takes the fused form, this is {onnx.manifest.form}.",
            "Export with `--form fused`.",
        )
    if onnx.manifest.sizes:
        raise Misuse(f"{onnx.folder}: has graphs of several sizes; target {target} takes one.", "Export one size each.")
    for port in onnx.manifest.inputs:
        free = [dim for index, dim in enumerate(port.shape) if isinstance(dim, str) and (index or dim != "batch")]
        if free:
            raise Misuse(
                f"{onnx.folder}: axis {free[0]} of input {port.name} is dynamic; target {target} takes the batch only.",
                "Export it with a fixed size.",
            )


def importable(module: str, cure: str) -> None:
    """Raises Misuse where the module is not installed; does not import it."""
    if importlib.util.find_spec(module) is None:
        raise Misuse(f"{module} is not installed.", cure)


def environment(module: str, folder: Path) -> dict[str, str]:
    """Environment of the child.

    The parser of TensorRT-RTX asks for a library name that its wheel does not have, and aborts: a link of that name is
    made in `folder`, which goes on the child's library path. This package is importable there.
    """
    found = dict(os.environ)
    here = str(Path(__file__).resolve().parents[2])
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [here, found.get("PYTHONPATH")]))
    wheel = importlib.util.find_spec("tensorrt_rtx_libs") if module == "tensorrt_rtx" else None
    for place in wheel.submodule_search_locations or () if wheel else ():
        for library in Path(place).glob("libtensorrt_rtx.so.*"):
            link = folder / "libtensorrt_rtx.so"
            link.unlink(missing_ok=True)
            link.symlink_to(library)
            found["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(folder), found.get("LD_LIBRARY_PATH")]))
    return found


def run_child(job: Mapping[str, Any], env: Mapping[str, str], *, package: str) -> dict[str, Any]:
    """The child's answer. Raises its error, or Failed where it ended without a word."""
    command = [sys.executable, "-m", "dit2deploy.targets.rtx_child"]
    try:
        done = subprocess.run(
            command, input=json.dumps(job), env=dict(env), capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise Failed(
            f"{package}: the build took longer than {TIMEOUT} s and was ended.", "Build on a machine that is less busy."
        ) from None
    lines = done.stdout.splitlines()
    if not lines:
        raise Failed(f"{package}: the build {_ending(done.returncode)}: {_last(done.stderr)}", _cure(done.returncode))
    answer = json.loads(lines[-1])
    if "error" in answer:
        kind: type[Dit2DeployError] = Misuse if answer["kind"] == "Misuse" else Failed
        raise kind(answer["error"], answer["cure"])
    return answer


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _cure(code: int) -> str:
    if -code == signal.SIGKILL:
        return "Build on a machine with more memory."
    return "Build anew; if it happens again, report it with the versions that `pip list` shows."


def _last(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip() and "cudaError 35" not in line]
    return lines[-1] if lines else "it said nothing."


def _with_kernel_weights(source: Path, folder: Path) -> Path:
    """Writes `source` into `folder` with its packed weights in the order of the CUDA kernels; gives the path."""
    model = ir.load(source)
    use_kernel_layout(model, kernel.FRAGMENT_ORDER)
    folder.mkdir()
    path = folder.resolve() / source.name
    save_streamed(model, path)
    return path


def _source(source: Path, plan: Plan, scratch: Path) -> Path:
    return source if plan.floats == FLOAT32 else with_half_matmuls(source, scratch)


def _details(
    model: ir.Model, onnx: OnnxModel, plan: Plan, path: Path, told: Mapping[str, Any], *, module: str
) -> dict[str, Any]:
    """What the child said, and what is in the file.

    Raises Failed where layers lost their plugins: TensorRT would run the function bodies, with dense weights.
    """
    native = {entry["name"] for entry in kernel.describe()}
    expected = Counter(node.op_type for node in model.graph if node.domain == DOMAIN and node.op_type in native)
    nodes, layers = expected.total(), told["plugin_layers"]
    if layers != nodes:
        raise Failed(
            f"{onnx.path}: {nodes} nodes have plugins, but TensorRT made {layers} plugin layers.",
            "Export the model anew.",
        )
    made = {
        **told,
        "compute_capabilities": list(plan.capabilities),
        "float_parts": plan.floats,
        "network_plugins": dict(sorted(expected.items())),
    }
    if module != "tensorrt_rtx":  # another layout of the file, which was never seen
        return made
    weights = _packed_weights(model)
    different, once = found_once(path, (tensor.tobytes() for tensor in weights))
    total = sum(tensor.nbytes for tensor in weights)
    inspected = inspect_engine(path)
    return {
        **made,
        "tensorrt": inspected["tensorrt"],
        "sm_mask": inspected["sm_mask"],
        "engine_plugins": inspected["plugins"],
        "packed_weights": different,
        "packed_weights_found_once": once,
        "packed_weight_bytes": total,
        "other_bytes": told["bytes"] - total,
    }


def _packed_weights(model: ir.Model) -> list[Any]:
    """The packed words of all GEMM nodes, shared ones once."""
    words = {node.inputs[W].name: node.inputs[W].const_value for node in filter(is_gemm, model.graph)}
    return [tensor for tensor in words.values() if tensor is not None]


@functools.cache
def version_of(module: str) -> tuple[int, ...]:
    """Leading numbers of an installed module's version, without importing it."""
    found = versions(module.replace("_", "-")).get(module.replace("_", "-"), "")
    return tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
