"""The engines that are compared, each in a process of its own: thread pools and libraries do not meet.

`python tools/blocks/engines.py ENGINE PATH THREADS` answers orders of `Engine`, a line of JSON each.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from blocks.made import GROUP, OWN, Made, inputs

Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]
FRESH = 99  # seed of inputs that no engine was calibrated on
_ANSWER = "answer "


def open_own(path: Path, threads: int) -> Run:
    from dit2deploy.artefacts.bundle import Bundle
    from dit2deploy.targets import by_name

    runner = by_name("ort-cpu").open(Bundle.load(path, check_hashes=False), threads=threads)
    return lambda feed: next(iter(runner.run(feed).values()))


def open_ort(path: Path, threads: int) -> Run:
    from dit2deploy.targets.ort import open_session

    runner = open_session(path, threads=threads, prepack=True)
    return lambda feed: next(iter(runner.run(feed).values()))


def open_torch(path: Path, threads: int, dtype: str = "float32") -> Run:
    import torch

    from dit2deploy.models.load import load_transformer

    torch.set_num_threads(threads)
    module = load_transformer(path)[0].to(getattr(torch, dtype))

    def run(feed: Mapping[str, np.ndarray]) -> np.ndarray:
        given = {name: torch.from_numpy(value) for name, value in feed.items()}
        given = {name: value.to(module.dtype) if value.is_floating_point() else value for name, value in given.items()}
        with torch.inference_mode():
            return module(**given, return_dict=False)[0].float().numpy()

    return run


def open_openvino(path: Path, threads: int, **options: str) -> Run:
    import openvino

    options = {"INFERENCE_NUM_THREADS": str(threads), "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY", **options}
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    return lambda feed: next(iter(request.infer(dict(feed)).values()))


@dataclass(frozen=True)
class Entry:
    """How an engine's files are made, how the child opens them, and what it imports before its memory is counted."""

    make: Callable[[Made], Path]
    open: Callable[[Path, int], Run]
    imports: tuple[str, ...]


_ORT = ("onnxruntime", "dit2deploy.targets.ort")
_TORCH = ("torch", "diffusers", "dit2deploy.models.load")
_OWN = ("dit2deploy.artefacts.bundle", "dit2deploy.targets")
_dynamic = partial(open_openvino, DYNAMIC_QUANTIZATION_GROUP_SIZE=str(GROUP))
# What users would pick instead.
BASELINES = {
    "torch fp32 eager": Entry(Made.pipeline, open_torch, _TORCH),
    "torch bf16 eager": Entry(Made.pipeline, partial(open_torch, dtype="bfloat16"), _TORCH),
    "ORT fp32": Entry(Made.float_onnx, open_ort, _ORT),
    "ORT dynamic int8": Entry(Made.ort_int8, open_ort, _ORT),
    "ORT MatMulNBits 4 bit": Entry(Made.ort_int4, open_ort, _ORT),
    "OpenVINO fp32": Entry(Made.float_onnx, open_openvino, ("openvino",)),
    "OpenVINO int8": Entry(Made.openvino_int8, open_openvino, ("openvino",)),
    "OpenVINO int4, dynamic int8": Entry(Made.openvino_int4, _dynamic, ("openvino",)),
}
ENTRIES = {name: Entry(partial(Made.bundle, own=own), open_own, _ORT + _OWN) for name, own in OWN.items()} | BASELINES


class Engine:
    """One engine in a child process. Raises RuntimeError where it cannot be made or opened, with the last words."""

    def __init__(self, made: Made, name: str, threads: int, log: Path) -> None:
        self.name, self._log = name, log
        try:
            path = ENTRIES[name].make(made)
        except ImportError as error:
            raise RuntimeError(str(error)) from None
        self.stored_bytes = stored_bytes(path)
        words = [sys.executable, __file__, name, str(path), str(threads)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment.pop("OMP_NUM_THREADS", None)
        with open(log, "w") as errors:
            self._child = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        try:
            self._answer()
        except RuntimeError:
            self.close()
            raise

    def run(self, batch: int) -> None:
        """One step of inputs that are kept."""
        self._order(run=batch)

    def result(self, path: Path, batch: int) -> np.ndarray:
        """The output of a fresh input, by way of the file `path`."""
        self._order(result=str(path), batch=batch)
        return np.load(path)

    def memory(self) -> dict[str, int]:
        """Bytes that the child has grown by over its imports."""
        return self._order(memory=True)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._child.communicate()

    def _order(self, **order: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(order) + "\n")
            self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        for line in self._child.stdout:  # libraries print as well
            if line.startswith(_ANSWER):
                return json.loads(line.removeprefix(_ANSWER))
        words = self._log.read_text().strip().splitlines()
        raise RuntimeError(words[-1] if words else f"ended with exit code {self._child.wait()}")


def stored_bytes(path: Path) -> int:
    """Of the files that the engine is opened from: a model and its weights, without our library."""
    inner = (path / name for name in ("ort-cpu", "transformer"))  # of a bundle, of a pipeline
    folder = path.parent if path.is_file() else next(folder for folder in inner if folder.is_dir())
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".so")


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own, and mapped from files (shared, evictable)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssFile:")}
    return {"anonymous": sizes["RssAnon"], "file": sizes["RssFile"]}


def serve(name: str, path: Path, threads: int) -> None:
    """Opens the engine and answers orders until there are no more."""
    for module in ENTRIES[name].imports:
        importlib.import_module(module)
    before = resident()
    run = ENTRIES[name].open(path, threads)
    answer(None)
    feeds: dict[int, dict[str, np.ndarray]] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "run" in order:
            batch = order["run"]
            run(feeds.setdefault(batch, inputs(batch)))
            answer(None)
        elif "result" in order:
            np.save(order["result"], run(inputs(order["batch"], seed=FRESH)))
            answer(None)
        else:
            answer({kind: size - before[kind] for kind, size in resident().items()})


def answer(value: Any) -> None:
    print(_ANSWER + json.dumps(value), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
