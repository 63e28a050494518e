"""Timing caches of TensorRT's builder: which calls are made, in which order, and what becomes of a file that is none.

The builder is a made-up one that only counts; the calls are those of the real bindings, which TensorRT-RTX has too,
where they do nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dit2deploy.base import progress
from dit2deploy.base.errors import Misuse
from dit2deploy.targets import cuda, rtx_child, tensorrt, tensorrt_rtx, trt_build, trt_cache

ABLE = tensorrt_rtx.availability()
HERE = b"gpu-1:"


class Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content or HERE

    def serialize(self):
        return memoryview(self.content)


class Config:
    """Takes caches of its own GPU alone, as the real one does without ignore_mismatch."""

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.cache = calls, None

    def create_timing_cache(self, serialized) -> Cache:
        self.calls.append(f"create {bytes(serialized).decode()}")
        return Cache(bytes(serialized))

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.calls.append(f"set {cache.content.decode()}")
        if not cache.content.startswith(HERE):
            return False
        self.cache = cache
        return True

    def add_optimization_profile(self, profile) -> None:
        pass


class Builder:
    """Times one kernel a network, unless its cache has the time."""

    calls: list[str] = []

    def __init__(self, log) -> None:
        pass

    def create_network(self, flags: int):
        return SimpleNamespace(num_inputs=0, num_layers=0)

    def create_builder_config(self) -> Config:
        return Config(self.calls)

    def create_optimization_profile(self):
        return None

    def build_serialized_network(self, network, config: Config):
        if config.cache is not None and b"relu" not in config.cache.content:
            config.cache.content += b"relu"
            self.calls.append("timed")
        self.calls.append("built")
        return memoryview(b"engine")


class ILogger:
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    made: list[str] = []
    monkeypatch.setattr(Builder, "calls", made)
    parser = SimpleNamespace(parse_from_file=lambda path: True)
    module = SimpleNamespace(
        __name__="made_up_trt",
        __version__="11.0.0.1",
        ILogger=ILogger,
        get_plugin_registry=lambda: SimpleNamespace(load_library=lambda path: object()),
        Builder=Builder,
        OnnxParser=lambda network, log: parser,
        LayerType=SimpleNamespace(PLUGIN_V3=0),
    )
    monkeypatch.setitem(sys.modules, "made_up_trt", module)
    monkeypatch.setattr(progress, "_listeners", [])
    return made


def build(folder: Path, cache: Path | None) -> list[str]:
    """Notes of a job with one engine."""
    entry = {"onnx": "x.onnx", "engine": str(folder / "x.engine"), "capabilities": []}
    job = {"module": "made_up_trt", "library": "", "profile": {}, "engines": [entry]}
    told = rtx_child.run({**job, "timing_cache": None if cache is None else str(cache)})
    assert told["version"] == "11.0.0.1" and (folder / "x.engine").read_bytes() == b"engine"
    return told["notes"]


def test_what_one_build_timed_the_next_one_knows(calls, tmp_path):
    cache = tmp_path / "user" / "x.timing"
    assert build(tmp_path, cache) == []
    assert calls == ["create ", "set gpu-1:", "timed", "built"]
    calls.clear()
    before = cache.stat().st_mtime_ns
    assert build(tmp_path, cache) == []
    assert calls == ["create gpu-1:relu", "set gpu-1:relu", "built"]
    assert cache.stat().st_mtime_ns == before and [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_without_a_file_there_is_no_cache(calls, tmp_path):
    assert build(tmp_path, None) == [] and calls == ["built"]


def test_a_broken_file_is_left_out_and_made_anew(calls, tmp_path):
    cache = tmp_path / "x.timing"
    build(tmp_path, cache)
    whole = cache.read_bytes()
    for broken in (b"", whole[:-1], whole[:10], whole[:-1] + b"?"):
        cache.write_bytes(broken)
        calls.clear()
        (told,) = build(tmp_path, cache)
        assert told == f"{cache}: is broken, so it is left out and made anew"
        assert calls == ["create ", "set gpu-1:", "timed", "built"] and cache.read_bytes() == whole


def test_times_of_another_gpu_are_left_out(calls, tmp_path):
    cache = tmp_path / "x.timing"
    trt_cache.write(cache, b"gpu-2:relu")
    (told,) = build(tmp_path, cache)
    assert told == f"{cache}: is of another GPU or TensorRT, so it is left out and made anew"
    assert calls == ["create gpu-2:relu", "set gpu-2:relu", "create ", "set gpu-1:", "timed", "built"]
    assert trt_cache.read(cache) == b"gpu-1:relu"


def test_a_folder_that_cannot_be_written_costs_a_note_and_no_build(calls, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    cache = tmp_path / "file" / "x.timing"
    told = build(tmp_path, cache)
    assert calls[-1] == "built" and told[-1].startswith(f"not kept for the next time: {cache}: cannot be written")


@pytest.mark.skipif(not ABLE.can_build, reason=f"tensorrt-rtx: {ABLE.reason}")
def test_the_real_bindings_take_these_calls(tmp_path):
    """TensorRT-RTX's do nothing, but they are there, by the names and with the arguments that TensorRT's have."""
    cache, environment = tmp_path / "x.timing", trt_build.environment("tensorrt_rtx", tmp_path)
    code = "import sys, tensorrt_rtx as trt; from pathlib import Path; from dit2deploy.targets.trt_cache import *\n"
    code += "config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()\n"
    code += "TimingCache(config, Path(sys.argv[1])).store(); assert config.get_timing_cache() is not None"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, cache], env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    assert len(trt_cache.read(cache)) > 0


@pytest.mark.skipif(not ABLE.can_build, reason=f"tensorrt-rtx: {ABLE.reason}")
def test_the_real_bindings_have_the_calls_of_the_runtime_cache(tmp_path):
    """Its objects take an engine that is open, and that takes a GPU: only what is there can be looked at."""
    calls = {
        "ICudaEngine": ["create_runtime_config", "create_execution_context"],
        "IRuntimeConfig": ["set_execution_context_allocation_strategy", "create_runtime_cache", "set_runtime_cache"],
        "IRuntimeCache": ["serialize", "deserialize"],
        "Runtime": ["get_engine_validity", "engine_header_size"],
    }
    code = f"import tensorrt_rtx as trt\nfor kind, names in {calls}.items():\n"
    code += "    for name in names:\n        print(getattr(getattr(trt, kind), name).__doc__)"
    environment = trt_build.environment("tensorrt_rtx", tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for told in ("runtime_config: tensorrt_rtx_bindings.tensorrt_rtx.IRuntimeConfig = None", "blob: ", ") -> bool"):
        assert told in done.stdout


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(cuda, "capability", lambda: "9.0")
    monkeypatch.setattr(cuda, "name", lambda: "NVIDIA H200 (MIG/1)")


def test_a_file_is_of_one_gpu_and_one_release(gpu, monkeypatch, tmp_path):
    found = trt_cache.timing_file(tmp_path, "tensorrt", "10.13.3.9")
    assert found == tmp_path / "tensorrt-10.13.3.9-sm90-NVIDIA-H200-MIG-1.timing"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(trt_cache.VARIABLE, raising=False)
    found = trt_cache.kernels_file("tensorrt-rtx", "1.7.1.116", 64 * "a")
    assert found == tmp_path / "dit2deploy" / "tensorrt-rtx-1.7.1.116-sm90-NVIDIA-H200-MIG-1-aaaaaaaaaaaaaaaa.kernels"
    monkeypatch.setenv(trt_cache.VARIABLE, str(tmp_path / "own"))
    assert trt_cache.folder() == tmp_path / "own"


@pytest.mark.parametrize("named", (None, "here"))
def test_target_tensorrt_times_into_the_users_folder_or_the_one_named(gpu, sample, monkeypatch, tmp_path, named):
    monkeypatch.setenv(trt_cache.VARIABLE, str(tmp_path / "user"))
    monkeypatch.setattr(tensorrt, "availability", lambda: SimpleNamespace(can_build=True))
    monkeypatch.setattr(tensorrt, "versions", lambda package: {package: "11.0.0.1"})

    def build_engines(onnx, *, timing_cache: Path, **_):
        raise Misuse(json.dumps(os.fspath(timing_cache)), "")

    monkeypatch.setattr(tensorrt, "build_engines", build_engines)
    options = {} if named is None else {"timing_cache": tmp_path / named}
    with pytest.raises(Misuse) as caught:
        tensorrt.build(sample.onnx, root=tmp_path, options=options)
    expected = tmp_path / (named or "user") / "tensorrt-11.0.0.1-sm90-NVIDIA-H200-MIG-1.timing"
    assert json.loads(caught.value.cause) == str(expected)
