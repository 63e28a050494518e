"""The runner of TensorRT engines and its CUDA graphs, with a made-up TensorRT on the emulated driver."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit2deploy.base.errors import Misuse
from dit2deploy.targets import kernel, trt_cache

ROOT = Path(__file__).resolve().parents[2]


def run(case: str, *arguments: Path) -> list[str]:
    try:
        main = kernel.library_path()
    except Misuse as error:
        pytest.skip(error.cause)
    driver = Path(os.environ.get("D2D_TEST_LIBRARIES", main.parent)) / "driver" / "libcuda.so.1"
    if not driver.is_file():
        pytest.skip(f"{driver} was not built")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(driver.parent)}
    script = ROOT / "tests" / "targets" / "trt_on_host.py"
    done = subprocess.run(
        [sys.executable, script, case, *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


REFUSED = [
    "refused: the engine refused the inputs: x of shape (1, 9). Compare them with the manifest.",
    "refused: the engine refused the inputs: rows of x is 3; it is built for 1 to 2. "
    "Build it anew with `--range rows=1:1:3`.",
]


def test_a_step_is_captured_once_for_each_set_of_shapes():
    """Enqueued to warm up and to be captured; the values of all seven calls are checked by the script."""
    assert run("captures") == [*REFUSED, "enqueued: 1 1 2 2"]


def test_what_cannot_be_captured_is_enqueued_with_one_note():
    told = "note: a step could not be captured as a CUDA graph, so none is: capturing a step: the engine refused."
    lines = run("allocates")
    assert lines[0] == told and lines[1:3] == REFUSED
    assert lines[3:] == ["enqueued: 1 1 1 1 2 1 2 2"]  # the second 1 was the capture


def test_kernels_are_compiled_once_for_all_openings(tmp_path):
    """With TensorRT-RTX: those of a step lie in the file when it ran, so that a process that is killed has them too."""
    cache = tmp_path / "user" / "engine.kernels"
    assert run("captures", cache) == ["compiled: 1", "compiled: 2", *REFUSED, "enqueued: 1 1 2 2"]
    kept = cache.read_bytes()
    assert kept[32:] == b"driver-1 1 2" and [path.name for path in cache.parent.iterdir()] == [cache.name]
    assert run("captures", cache) == [*REFUSED, "enqueued: 1 1 2 2"]
    assert cache.read_bytes() == kept


@pytest.mark.parametrize(("before", "told"), [(b"driver-2 1 2", "is of another GPU, driver"), (None, "is broken")])
def test_kernels_that_do_not_fit_are_compiled_anew_with_one_note(tmp_path, before: bytes | None, told: str):
    cache = tmp_path / "engine.kernels"
    if before is None:
        cache.write_bytes(b"something else that is longer than a digest")
    else:
        trt_cache.write(cache, before)
    lines = run("captures", cache)
    assert lines[0].startswith(f"note: {cache}: {told}") and lines[1:3] == ["compiled: 1", "compiled: 2"]
    assert trt_cache.read(cache) == b"driver-1 1 2"


def test_a_cache_that_cannot_be_written_costs_a_note_and_no_step(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    lines = run("captures", tmp_path / "file" / "engine.kernels")
    assert "compiled: 1" in lines and lines[-1] == "enqueued: 1 1 2 2"
    assert [line for line in lines if line.startswith("note: not kept for the next time: ")]
