"""The process that builds TensorRT engines: a JSON job on stdin, engine files, one JSON line on stdout.

    python -m dit2deploy.targets.rtx_child < job.json

A job: {"module": "tensorrt_rtx" or "tensorrt", "library": the plugin library, "profile": {input: [[least, usual, most],
.. of its dynamic axes]}, "timing_cache": a file, which need not be there, or null, "engines": [{"onnx", "engine",
"capabilities": ["8.6", ..], or [] for the GPU at hand}, ..]}.
The line: {"version": TensorRT's, "peak_rss_mb", "notes": [..], "engines": [{"bytes", "seconds", "layers",
"plugin_layers"}, ..]} or {"kind": "Misuse" or "Failed", "error", "cure"}.
A process of its own survives what aborts TensorRT, can be timed out, and has LD_LIBRARY_PATH from its start.
"""

import importlib
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

from dit2deploy.base.errors import Dit2DeployError, Failed, Misuse
from dit2deploy.base.files import whole_file
from dit2deploy.base.progress import listen
from dit2deploy.targets.trt_cache import TimingCache

# TensorRT-RTX says this after every error on a machine without a driver; building takes none.
_HARMLESS = re.compile(r"cudaError 35\b|CUDA driver version is insufficient|CUDA initialization failure with error: 35")
_TOLD = 12  # lines of TensorRT's log that an error carries


def main() -> int:
    """Serves one job; exit code 0 where the line tells of engines, 1 where it tells an error."""
    # TensorRT prints to stdout at times: the line gets the old stdout for itself, everything else goes to stderr.
    line = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        answer = run(json.load(sys.stdin))
    except Dit2DeployError as error:
        answer = {"kind": type(error).__name__, "error": error.cause, "cure": error.cure}
    print(json.dumps(answer), file=line, flush=True)
    return 1 if "error" in answer else 0


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Builds the engines of a job, one after another. Raises Misuse and Failed."""
    try:
        trt = importlib.import_module(job["module"])
    except Exception as error:  # a missing library of the wheel may raise anything
        raise Misuse(f"{job['module']} cannot be imported: {error}.", f"pip install {job['module']}") from None
    log = make_log(trt)
    if trt.get_plugin_registry().load_library(job["library"]) is None:
        raise Misuse(f"{job['library']}: TensorRT cannot load it: {log.told()}", "Compile the kernels on this machine.")
    notes: list[str] = []
    listen(lambda what, done, total: notes.append(what) if total == 0 else None)
    engines = [_build(trt, log, entry, job["profile"], job["timing_cache"]) for entry in job["engines"]]
    # Kilobytes on Linux.
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    return {"version": trt.__version__, "engines": engines, "notes": notes, "peak_rss_mb": peak}


def make_log(trt: Any) -> Any:
    """A logger that keeps errors and warnings instead of printing them."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity, message: str) -> None:
            worst = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)
            if severity in worst and not _HARMLESS.search(message) and message not in self.lines:
                self.lines.append(message)

        def told(self) -> str:
            """What there is to say, and nothing of it the next time."""
            lines, self.lines = self.lines[:_TOLD], []
            return " | ".join(lines) or "TensorRT gave no reason."

    return Log()


def _build(
    trt: Any, log: Any, entry: dict[str, Any], ranges: dict[str, list[list[int]]], timing_cache: str | None
) -> dict[str, Any]:
    begin = time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(entry["onnx"]):
        raise _refusal(parser, entry["onnx"], log)
    config = builder.create_builder_config()
    if entry["capabilities"]:
        config.num_compute_capabilities = len(entry["capabilities"])
        for index, name in enumerate(entry["capabilities"]):
            if not config.set_compute_capability(_capability(trt, name), index):
                raise Misuse(f"{trt.__name__} {trt.__version__} refuses compute capability {name}.", "Leave it out.")
    config.add_optimization_profile(_profile(builder, network, ranges))
    timings = TimingCache(config, Path(timing_cache)) if timing_cache else None
    engine = builder.build_serialized_network(network, config)
    if timings is not None:  # a build that failed took times too
        timings.store()
    if engine is None:
        wanted = ", ".join(entry["capabilities"]) or "this GPU"
        raise Failed(
            f"{entry['onnx']}: TensorRT built no engine for {wanted}: {log.told()}",
            "Leave that compute capability out, or export the model anew.",
        )
    with whole_file(Path(entry["engine"])) as temporary:
        temporary.write_bytes(memoryview(engine))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return {
        "bytes": engine.nbytes,
        "seconds": round(time.perf_counter() - begin, 2),
        "layers": len(layers),
        "plugin_layers": sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers),
    }


def _network_flags(trt: Any) -> int:
    """TensorRT 10 is strongly typed on demand, its successors and TensorRT-RTX always."""
    if trt.__name__ == "tensorrt" and trt.__version__.startswith("10."):
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0


def _capability(trt: Any, name: str) -> Any:
    found = getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}", None)
    if found is None:
        raise Misuse(f"{trt.__name__} {trt.__version__} does not know compute capability {name}.", "Leave it out.")
    return found


def _profile(builder: Any, network: Any, ranges: dict[str, list[list[int]]]) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        port = network.get_input(index)
        asked = iter(ranges[port.name])
        lengths = [next(asked) if dim == -1 else (dim, dim, dim) for dim in port.shape]
        profile.set_shape(port.name, *zip(*lengths, strict=True))
    return profile


def _refusal(parser: Any, onnx: str, log: Any) -> Dit2DeployError:
    """The parser's errors, each fault once with the first node that has it."""
    faults: dict[str, str] = {}
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        fault = error.desc().strip().rstrip(".")
        faults.setdefault(fault, f"node {error.node_name()} ({error.node_operator()}): {fault}")
    text = " | ".join(list(faults.values())[:_TOLD]) or log.told()
    cure = "Export the model anew, with a version of dit2deploy that fits its kernel library."
    return Failed(f"{onnx}: TensorRT cannot read it: {text}.", cure)


if __name__ == "__main__":
    sys.exit(main())
