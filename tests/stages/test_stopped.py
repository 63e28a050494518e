"""Every stage that writes, killed in the middle or on a disk that is full: nothing half-written, and the next run ends
in the same bytes."""

import os
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import write_tensors
from dit2deploy.stages.build import build
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.export import export
from dit2deploy.stages.finetune import Settings, finetune
from dit2deploy.stages.fuse_lora import fuse_lora
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.sample import sample
from dit2deploy.stages.search import search
from tests.bundles import sources
from tests.tracing import lower_once

TRAINING = Settings(steps=6, batch=2, trajectories=1)


def _lora(folder: Path) -> Path:
    path = folder / "lora.safetensors"
    name = "transformer.transformer_blocks.0.attn1.to_q"
    write_tensors(
        path, {f"{name}.lora_{leaf}.weight": np.ones(s, "f4") for leaf, s in (("A", (2, 48)), ("B", (48, 2)))}
    )
    return path


def _quantize(out: Path) -> None:
    policy = search(sources().pipeline, out.with_name("policy.json"), recipe="w4a4", low_rank=2)  # GPTQ: walks
    quantize(sources().pipeline, policy, CalibrationSet.load(sources().calibration), out)


def _finetune(out: Path) -> None:
    calibration = CalibrationSet.load(sources().calibration)
    checkpoint = Checkpoint.load(sources().checkpoint)
    finetune(sources().pipeline, checkpoint, out, calibration=calibration, settings=TRAINING, save_every=2)


def _measured_search(out: Path) -> None:
    search(sources().pipeline, out, recipe="robuq-ampn", calibration=sources().calibration, items=4)


def _build(out: Path) -> None:
    build(sources().onnx, out, targets=["ort-cpu"], calibration=sources().calibration, model=sources().pipeline)


STAGES: dict[str, Callable[[Path], object]] = {
    "calibrate": lambda out: calibrate(sources().pipeline, out, samples=2, steps=3),
    "search": _measured_search,
    "quantize": _quantize,
    "finetune": _finetune,
    "export": lambda out: export(sources().checkpoint, out),
    "build": _build,
    "fuse-lora": lambda out: fuse_lora(sources().pipeline, _lora(out.parent), out),
    "sample": lambda out: sample(_bundle(), out, labels=[1], steps=2),
}
# Files with times and dates in them.
_TOLD = ("manifest.json", "quantization_config.json")


def _bundle() -> Path:
    folder = sources().onnx.with_name("bundle")
    if not folder.exists():
        _build(folder)
    return folder


def content(out: Path) -> dict[str, bytes]:
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out.parent)): path.read_bytes() for path in files if path.name not in _TOLD}


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    with pytest.MonkeyPatch.context() as patch:
        lower_once(patch, [])
        _bundle()
        patch.setattr("dit2deploy.stages.export.check.check_results", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str], tuple[dict[str, bytes], int]]:
    """What a stage writes when nothing stops it, and how many times it puts something in place."""
    made: dict[str, tuple[dict[str, bytes], int]] = {}

    def of(stage: str) -> tuple[dict[str, bytes], int]:
        if stage not in made:
            out, count = tmp_path_factory.mktemp(stage) / "out", [0]
            with pytest.MonkeyPatch.context() as patch:
                _watch(patch, lambda target: count.append(1))
                STAGES[stage](out)
            made[stage] = content(out), len(count) - 1
        return made[stage]

    return of


def _watch(patch: pytest.MonkeyPatch, before: Callable[[Path], object]) -> None:
    """`before` is told of each file and folder that is about to be put in place."""
    replace = os.replace

    def watched(source, target):
        before(Path(target))
        replace(source, target)

    patch.setattr(os, "replace", watched)


def _killed(run: Callable[[], object], when: Callable[[Path], bool]) -> None:
    """Runs in a process that is killed where it is about to put in place what `when` says."""
    child = os.fork()
    if not child:
        try:
            with pytest.MonkeyPatch.context() as patch:
                _watch(patch, lambda target: when(target) and os.kill(os.getpid(), signal.SIGKILL))
                run()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_leaves_nothing_that_the_next_does_not_use_or_remove(stage, whole, tmp_path, monkeypatch):
    want, count = whole(stage)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    out, seen = tmp_path / "out", []
    # In the middle, and when all is written but the name.
    for when in (lambda target: seen.append(target) or len(seen) == (count + 1) // 2, lambda target: target == out):
        _killed(lambda: STAGES[stage](out), when)
        assert not out.exists()
    STAGES[stage](out)
    assert content(out) == want
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.parts")) and not list(scratch.iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_is_one_error_and_loses_nothing(stage, whole, tmp_path):
    want, _ = whole(stage)
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(map(len, want.values())) - 1, limits[1]))
    try:
        with pytest.raises(Misuse, match=r"out.*cannot be written: File too large\.") as caught:
            STAGES[stage](out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Free some space" in caught.value.cure and "/." not in caught.value.cause
    assert not out.exists() and not list(tmp_path.glob(".*"))
    STAGES[stage](out)
    assert content(out) == want
