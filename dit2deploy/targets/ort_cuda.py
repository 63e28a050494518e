"""Target `ort-cuda`: ONNX Runtime's CUDA provider with our CUDA kernels as custom ops, on the provider's stream.

The library is that of the other targets: it finds the CUDA driver when it runs. Nothing here was ever run on a GPU: the
custom ops compute on an emulated driver, and the runner's buffers are tested in host memory.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir

from dit2deploy.artefacts.bundle import Bundle, TargetRecord
from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.base.progress import note
from dit2deploy.targets import cuda, kernel, ort_build
from dit2deploy.targets.by_size import graphs_of, open_sizes
from dit2deploy.targets.float_types import HALVES, floats_of
from dit2deploy.targets.graph import tell_slow_gemms
from dit2deploy.targets.ort import ON_CPU, OrtRunner, open_session, runtime
from dit2deploy.targets.ort_cuda_runner import OrtCudaRunner
from dit2deploy.targets.ort_placement import RECORD, check_placement, on_cpu
from dit2deploy.targets.reference import refuse_options
from dit2deploy.targets.target import Availability, Runner, Target, library_of

NAME = "ort-cuda"
PROVIDER = "CUDAExecutionProvider"
_INSTALL = "Install it in the place of onnxruntime: pip uninstall onnxruntime; pip install 'dit2deploy[cuda]'."


def availability() -> Availability:
    """Building takes the kernel library; running takes onnxruntime-gpu and an NVIDIA GPU."""
    return ort_build.availability(_runtime)


def check(options: Mapping[str, Any]) -> None:
    refuse_options(NAME, options, known=("floats",))
    if floats_of(NAME, options) == "bfloat16":
        raise Misuse(f"target {NAME}: ONNX Runtime's attention on CUDA takes no bfloat16.", "Take float16.")


def build(onnx: OnnxModel, *, root: Path, options: Mapping[str, Any]) -> TargetRecord:
    """Graphs of custom ops with weights in the order of the tensor cores' fragments.

    Option `floats`: the type of the activations. Attention becomes the runtime's own operator, whose CUDA kernels take
    float32 and float16 and no bfloat16.
    """
    check(options)
    floats = floats_of(NAME, options)
    made, model = ort_build.build_custom_ops(onnx, root=root, target=NAME, layout=kernel.FRAGMENT_ORDER, floats=floats)
    tell_slow_gemms(model, NAME, halves=floats in HALVES)
    return made


def open_engine(bundle: Bundle, *, threads: int | None = None, values: Sequence[str] = ()) -> Runner:
    """The engine on the first GPU; `threads` are those of the shape arithmetic, which stays on the CPU."""
    module = _runtime()
    if hasattr(module, "preload_dlls"):
        # From 1.21 on: finds CUDA's and cuDNN's wheels, and prints what it does not find.
        with redirect_stdout(sys.stderr):
            module.preload_dlls()
    opened = partial(open_on_gpu, library=library_of(bundle, NAME), threads=threads, values=values)
    return open_sizes(graphs_of(bundle, NAME), opened)


def _runtime() -> ModuleType:
    """onnxruntime with its CUDA provider, on a machine with a GPU; Misuse elsewhere."""
    module = runtime()
    if PROVIDER not in module.get_available_providers():
        raise Misuse(f"onnxruntime {module.__version__} has no {PROVIDER}.", _INSTALL)
    cuda.capability()
    return module


def open_on_gpu(path: Path, *, library: Path, threads: int | None, values: Sequence[str]) -> OrtCudaRunner:
    """One graph of the engine, its nodes where they belong; a note tells where steps are not captured, and why."""
    opened = partial(session_on_gpu, path, library=library, threads=threads, values=values)
    try:
        runner, why_not = opened(graphs=True), ""
    except Failed as error:
        # A graph that ONNX Runtime cannot capture stops it; whatever else is wrong is told again.
        runner, why_not = opened(graphs=False), error.cause
    names = on_cpu(runner.session)
    try:
        if names is None:
            why_not = why_not or "this onnxruntime does not tell where nodes run; 1.24 and newer do"
        else:
            why_not = check_placement(ir.load(path), names) or why_not
    except Failed:
        runner.close()
        raise
    if why_not:
        note(f"{NAME}: steps are not captured as CUDA graphs: {why_not}")
    return OrtCudaRunner(runner, captures=not why_not, reopen=partial(opened, graphs=False))


def session_on_gpu(path: Path, *, library: Path, threads: int | None, values: Sequence[str], graphs: bool) -> OrtRunner:
    """A session on the GPU; Failed where the CUDA provider did not open, which ONNX Runtime only logs."""
    # Float32 is float32: by default products would be rounded to TF32's 10 bits of mantissa.
    options = {"use_tf32": "0", "enable_cuda_graph": "1" if graphs else "0"}
    runner = open_session(
        path,
        threads=threads,
        values=values,
        library=library,
        prepack=True,
        providers=((PROVIDER, options), ON_CPU),
        config=RECORD,
    )
    if PROVIDER not in runner.session.get_providers():
        runner.close()
        raise Failed(
            f"{path}: ONNX Runtime could not open its CUDA provider (its reason is above).",
            "Install the CUDA libraries and cuDNN that it asks for, e.g. pip install 'onnxruntime-gpu[cuda,cudnn]'.",
        )
    return runner


TARGET = Target(NAME, availability, check, build, open_engine)
