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
from dit2deploy.artefacts.onnx_model import OWN, OnnxModel
from dit2deploy.base.disk import scratch_folder
from dit2deploy.base.errors import Dit2DeployError, Failed, Misuse
from dit2deploy.base.machine import versions
from dit2deploy.base.progress import note
from dit2deploy.targets import kernel
from dit2deploy.targets.by_size import size_of
from dit2deploy.targets.float_types import (
    FLOAT32,
    HALVES,
    thresholds_of,
    use_half_activations,
    use_half_products,
)
from dit2deploy.targets.graph import (
    DOMAIN,
    W,
    drop_native_bodies,
    is_gemm,
    pack_codes,
    packed_quantizers,
    save_graphs,
    tell_slow_gemms,
    use_kernel_layout,
)
from dit2deploy.targets.trt_engine import found_once, inspect_engine
from dit2deploy.targets.trt_profile import profile_of, ranges_of

TIMEOUT = 3600  # seconds; a model of 12 billion parameters takes minutes
HALF = "float32, matrix products and convolutions of the float parts in float16"


@dataclass(frozen=True)
class Plan:
    """One engine: its label, the compute capabilities that it is for (none: the GPU at hand), and the type of its
    activations (of float_types.FLOATS, or HALF)."""

    label: str
    capabilities: tuple[str, ...]
    floats: str = FLOAT32


@dataclass(frozen=True)
class Engine:
    """One file: for the GPUs of a plan, of the graph for one size of latents ("" where it takes any)."""

    label: str
    plan: Plan
    graph: Path
    size: str
    path: Path


def build_engines(
    onnx: OnnxModel,
    *,
    root: Path,
    target: str,
    module: str,
    package: str,
    plans: Sequence[Plan],
    ranges: Mapping[str, Sequence[int]],
    timing_cache: Path | None = None,
    packed: bool = True,
) -> TargetRecord:
    """Writes `root / target / LABEL.engine` for each plan and size, and the plugin library; tells what they hold.

    `ranges`: least, usual and most length of dynamic axes, in the place of those that the manifest tells.
    `timing_cache`: a file of the times that the builder takes of kernels, read and written. `packed`: two codes of
    activations a byte where they have at most 4 bits. Raises Misuse for a model that is not of the fused form, Failed
    where TensorRT builds nothing or drops the plugins.

    The library lies beside the engines and not in them (`plugins_to_serialize`): one copy of some megabytes serves all
    engines of the bundle; it can be replaced by one for a newer GPU without a new build; and an engine that
    holds code makes its opening run that code (`engine_host_code_allowed`), which TensorRT refuses by default and we
    never allow: loading an engine executes nothing of it, and the library is a file that the manifest vouches for.
    """
    check_form(onnx, target)
    profile = profile_of(onnx, ranges)
    folder = root / target
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / kernel.LIBRARY_NAME
    shutil.copyfile(kernel.library_path(), library)
    with scratch_folder() as scratch:
        source = Path(scratch) / "weights"
        halves = any(plan.floats in HALVES for plan in plans)
        tell_slow_gemms(_with_kernel_weights(onnx, source, packed=packed), target, halves=halves)
        engines = _engines(onnx, plans, source, folder)
        job = {
            "module": module,
            "library": str(library.resolve()),
            "profile": ranges_of(profile, onnx.manifest.inputs),
            "timing_cache": None if timing_cache is None else str(timing_cache.absolute()),
            "engines": [
                {
                    "onnx": str(_source(engine)),
                    "engine": str(engine.path.resolve()),
                    "capabilities": engine.plan.capabilities,
                }
                for engine in engines
            ],
        }
        answer = run_child(job, environment(module, Path(scratch)), package=package)
        made = {
            engine.label: _details(onnx, engine, told, module=module)
            for engine, told in zip(engines, answer["engines"], strict=True)
        }
    return TargetRecord(
        engines={engine.label: str(engine.path.relative_to(root)) for engine in engines},
        files=tuple(str(path.relative_to(root)) for path in (*(engine.path for engine in engines), library)),
        # A device holds those of one plan.
        weight_bytes=max(
            sum(made[engine.label]["bytes"] for engine in engines if engine.plan == plan) for plan in plans
        ),
        # Plans differ where one has HALF, which changes nothing that is compared: engines give outputs only.
        thresholds=thresholds_of(plans[0].floats),
        details={
            "engines": made,
            "profile": {name: axis.model_dump() for name, axis in profile.items()},
            "library_bytes": library.stat().st_size,
            "layout": kernel.FRAGMENT_ORDER,
            "peak_rss_mb": answer["peak_rss_mb"],
            "not_run": "The engines were built and inspected here, not run; running them takes an NVIDIA GPU.",
        },
        versions={**versions("onnx-ir"), package: answer["version"]},
    )


def _engines(onnx: OnnxModel, plans: Sequence[Plan], source: Path, folder: Path) -> list[Engine]:
    """Labels are those of the plans; that of another size than the manifest's has it behind a point: "sm86.64x96"."""
    own = size_of(onnx.manifest.inputs)
    made = []
    for plan in plans:
        for size, name in onnx.graphs.items():
            label = plan.label if size == OWN else f"{plan.label}.{size}"
            path = folder / f"{label}.engine"
            made.append(Engine(label, plan, source / name, own if size == OWN else size, path))
    return made


def check_form(onnx: OnnxModel, target: str) -> None:
    """Raises Misuse for a model that TensorRT's plugins have no place in."""
    if onnx.manifest.form != "fused":
        raise Misuse(
            f"{onnx.folder}: target {target} takes the fused form, this is {onnx.manifest.form}.",
            "Export with `--form fused`.",
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
    for told in answer["notes"]:
        note(told)
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


def _with_kernel_weights(onnx: OnnxModel, folder: Path, *, packed: bool) -> ir.Model:
    """Writes the graphs into `folder` as the CUDA kernels take them, weights and codes; gives the first."""
    folder.mkdir()

    def prepare(model: ir.Model) -> None:
        use_kernel_layout(model, kernel.FRAGMENT_ORDER)
        if packed:
            pack_codes(model)
        drop_native_bodies(model)

    return save_graphs(onnx, folder, prepare)


def _source(engine: Engine) -> Path:
    """The engine's graph, or one beside it over the same data, in the plan's types."""
    floats = engine.plan.floats
    if floats == FLOAT32:
        return engine.graph
    model = ir.load(engine.graph)
    if floats == HALF:
        use_half_products(model)
    else:
        use_half_activations(model, floats)
    path = engine.graph.with_name(f"{engine.label}.onnx")
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return path


def _details(onnx: OnnxModel, engine: Engine, told: Mapping[str, Any], *, module: str) -> dict[str, Any]:
    """What the child said, and what is in the file.

    Raises Failed where layers lost their plugins: TensorRT would run the function bodies, with dense weights.
    """
    model, plan, path = ir.load(engine.graph), engine.plan, engine.path
    native = {entry["name"] for entry in kernel.describe()}
    expected = Counter(node.op_type for node in model.graph if node.domain == DOMAIN and node.op_type in native)
    nodes, layers = expected.total(), told["plugin_layers"]
    if layers != nodes:
        raise Failed(
            f"{onnx.folder / engine.graph.name}: {nodes} nodes have plugins, but TensorRT made {layers} plugin layers.",
            "Export the model anew.",
        )
    made = {
        **told,
        "size": engine.size,
        "compute_capabilities": list(plan.capabilities),
        "float_parts": plan.floats,
        "network_plugins": dict(sorted(expected.items())),
        "packed_quantizers": packed_quantizers(model),
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
