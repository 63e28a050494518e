"""A GPU as torch sees it: memory, our launches on torch's current stream, times, ceilings and the state of the card.

Our part of the package is read without the rest of it, so that a machine needs torch, numpy and the kernel library.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import note

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 3
FEWEST_ROUNDS, MOST_ROUNDS = 7, 40
IN_A_GRAPH = 20
CHOICE = "DIT2DEPLOY_CUDA"  # which of our kernels run, where a GPU has a choice
LEAST_FLUSHED = 256 << 20  # some 80 us on the fastest cards: longer than the host takes to enqueue what follows
METHOD = (
    "cold_us: contestants take turns in rounds; each turn overwrites more than twice the second-level cache and times "
    "one call between two CUDA events, so neither weights nor activations are in the cache. Ratios are taken within a "
    "round, the baseline's time over ours: median and quartiles. hot_us: calls back to back in a CUDA graph, the "
    "median of its replays by its calls. Ceilings are measured in the same run."
)


def load_kernels():
    """dit2deploy.targets.kernel by its file: the package dit2deploy.targets imports every runtime's needs."""
    name = "dit2deploy_kernel"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "dit2deploy" / "targets" / "kernel.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


kernel = load_kernels()


# Types of activations by the names of build's --floats, with torch's and the number of the ops' attribute `dtype`.
FLOATS = {"float32": (torch.float32, 1), "float16": (torch.float16, 10), "bfloat16": (torch.bfloat16, 16)}


@dataclass(frozen=True)
class Dtype:
    """A dtype by its name alone: numpy by itself has no bfloat16."""

    name: str


@dataclass(frozen=True)
class Contestant:
    name: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, measured: bytes read and written a second, operations (2 M K N) a second."""

    bytes_a_second: float
    fp16_a_second: float
    int8_a_second: float


class Device:
    """The first GPU. Tests have another one, that times nothing."""

    name = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise Misuse(
                "torch sees no NVIDIA GPU here.",
                "Run this on a machine with one; everything but the timing is tested without: tests/test_bench_gpu.py.",
            )
        torch.cuda.init()
        torch.empty(1, device=self.name)  # makes the context current
        self.properties = torch.cuda.get_device_properties(0)
        cache = getattr(self.properties, "L2_cache_size", 0) or (64 << 20)
        self._flushed = torch.empty(max(2 * cache, LEAST_FLUSHED), dtype=torch.int8, device=self.name)
        self._side = torch.cuda.Stream()

    # Memory

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.name)

    def launcher(
        self,
        op: str,
        inputs: Sequence[torch.Tensor],
        attributes: Mapping[str, int | str],
        outputs: Sequence[torch.Tensor],
        kernels: str = "mma",
        tactic: int = 0,
    ) -> Callable[[], None]:
        """A function that enqueues our op on torch's current stream; it keeps the tensors and its workspace alive.

        `kernels`: what $DIT2DEPLOY_CUDA says then; `tactic`: as of `kernel.launcher`.
        """
        tensors = [*map(_memory, inputs)], attributes, [*map(_memory, outputs)]
        room = torch.empty(kernel.workspace_bytes(op, *tensors), dtype=torch.int8, device=self.name)
        enqueue = kernel.launcher(op, *tensors, tactic=tactic, workspace=room.data_ptr())
        return partial(_enqueue, enqueue, self.stream, kernels, (*inputs, *outputs, room))

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def load(self) -> float:
        """Seconds of the first launch: the driver compiles the kernels for the card, unless its cache has them."""
        x, qmax = torch.ones(1, 8, device=self.name), torch.ones(1, device=self.name)
        outputs = [torch.empty(1, 8, dtype=torch.int8, device=self.name), torch.empty(1, 1, device=self.name)]
        begin = time.monotonic()
        self.launcher("HadamardQuantize", [x, qmax], {"block": 8}, outputs)()
        self.synchronize()
        return time.monotonic() - begin

    # Time

    def times(self, contestants: Sequence[Contestant], *, seconds: float) -> dict[str, list[float]]:
        """Microseconds of each round by contestant, cold (METHOD)."""
        self._warm_up(contestants)
        begin = time.monotonic()
        times = self._rounds(contestants, FEWEST_ROUNDS)
        a_round = (time.monotonic() - begin) / FEWEST_ROUNDS
        more = min(MOST_ROUNDS, int(seconds / a_round)) - FEWEST_ROUNDS
        if more > 0:
            for name, values in self._rounds(contestants, more).items():
                times[name] += values
        return times

    def _warm_up(self, contestants: Sequence[Contestant]) -> None:
        for contestant in contestants:
            for _ in range(WARM_UP):
                contestant.run()
        self.synchronize()

    def _rounds(self, contestants: Sequence[Contestant], rounds: int) -> dict[str, list[float]]:
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {c.name: [] for c in contestants}
        for _ in range(rounds):
            for contestant in contestants:
                # It takes longer than enqueueing what follows: no gap of the host's lies between the events.
                self._flushed.zero_()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                contestant.run()
                end.record()
                events[contestant.name].append((begin, end))
        self.synchronize()
        return {name: [1000 * begin.elapsed_time(end) for begin, end in pairs] for name, pairs in events.items()}

    def hot_times(self, contestants: Sequence[Contestant], cold: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Microseconds of a call in a CUDA graph of calls back to back; none of what cannot be captured."""
        found = {}
        for contestant in contestants:
            calls = int(np.clip(2000 / np.median(cold[contestant.name]), 1, IN_A_GRAPH))
            try:
                replay = [Contestant("graph", self._capture(contestant.run, calls))]
            except RuntimeError as error:
                note(f"{contestant.name} cannot be captured: {error}")
                continue
            self._warm_up(replay)
            found[contestant.name] = float(np.median(self._rounds(replay, FEWEST_ROUNDS)["graph"])) / calls
        return found

    def _capture(self, run: Callable[[], Any], calls: int) -> Callable[[], None]:
        """A replay of so many calls. torch.cuda.graph would empty torch's cache of memory each time."""
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._side):
            graph.capture_begin()
            try:
                for _ in range(calls):
                    run()
            finally:
                graph.capture_end()
        return graph.replay

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """The same work as a CUDA graph's replay."""
        self._warm_up([Contestant("graph", run)])
        return self._capture(run, 1)

    def ceilings(self, *, copied: int = 1 << 30, side: int = 8192) -> Ceilings:
        """A copy of `copied` bytes, and square products of random matrices."""
        source = torch.randint(-128, 128, (copied,), dtype=torch.int8, device=self.name)
        target = torch.empty_like(source)
        half = torch.randn(2, side, side, dtype=torch.float16, device=self.name)
        codes = torch.randint(-128, 128, (2, side, side), dtype=torch.int8, device=self.name)
        contestants = [
            Contestant("copy", lambda: target.copy_(source)),
            Contestant("fp16", lambda: torch.matmul(half[0], half[1].T)),
            Contestant("int8", lambda: torch._int_mm(codes[0], codes[1].T)),
        ]
        best = {name: min(times) / 1e6 for name, times in self.times(contestants, seconds=2).items()}
        operations = 2 * side**3
        return Ceilings(2 * copied / best["copy"], operations / best["fp16"], operations / best["int8"])

    # What it is

    def capability(self) -> str:
        return f"{self.properties.major}.{self.properties.minor}"

    def describe(self) -> dict[str, Any]:
        keys = ("name", "total_memory", "multi_processor_count", "L2_cache_size")
        values = {key: getattr(self.properties, key, None) for key in keys}
        driver = self.state().get("driver_version")
        return {
            **values,
            "capability": self.capability(),
            "driver": driver,
            "cuda": torch.version.cuda,
            "fp16_accumulation": torch.backends.cuda.matmul.allow_fp16_accumulation
            if hasattr(torch.backends.cuda.matmul, "allow_fp16_accumulation")
            else None,
        }

    def state(self) -> dict[str, str]:
        """Clocks, load, temperature and power as nvidia-smi gives them; empty where it does not answer."""
        keys = (
            *("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "utilization.gpu", "temperature.gpu"),
            *("power.draw", "memory.used"),
        )
        command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "--id=0"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return {}
        return dict(zip(keys, (value.strip() for value in done.stdout.split(",")), strict=False))


def _enqueue(
    enqueue: Callable[[int], None], stream: Callable[[], int], kernels: str, _kept: tuple[torch.Tensor, ...]
) -> None:
    if os.environ.get(CHOICE) != kernels:
        os.environ[CHOICE] = kernels
    enqueue(stream())


def _memory(tensor: torch.Tensor):
    if not tensor.is_contiguous():
        raise Misuse("our ops take dense tensors.", "Call contiguous().")
    return kernel.Memory(tensor.data_ptr(), Dtype(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))
