"""The emulator sees the mistakes that a GPU would forgive today and punish tomorrow."""

import subprocess

import pytest

from tests.plugins.compiling import HERE, PLUGINS, compile_cpp

MISTAKES = {
    "barrier_removed": "a barrier is missing",
    "second_barrier_removed": "a barrier is missing",
    "two_writers": "races with a write by thread",
    "out_of_bounds": "touches element 64 of a shared array of 64",
    "before_the_start": "touches element -1 of a shared array of 64",
    "divergent_barrier": "wait at different barriers",
    "unwritten_read": "thread 0 of block (0, 0) reads shared memory that nobody wrote",
    "leaves_before_a_barrier": "waits for ever for threads that have left",
    "leaves_before_a_shuffle": "waits for ever for threads that have left",
    "divergent_shuffle": "wait in different shuffles",
    "too_much_shared": "more than 48 KiB of shared memory",
    "too_much_dynamic": "more dynamic shared memory than the launch asked for",
}
SEEDS = range(5)


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    sources = [HERE / "mistakes.cu", PLUGINS / "cuda_on_host" / "emulator.cc"]
    out = tmp_path_factory.mktemp("emulator") / "mistakes"
    return compile_cpp(out, sources, "-O1", "-Wno-unused-variable", folders=("base", "cuda", "cuda_on_host"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", MISTAKES)
def test_a_mistake_is_reported_in_any_order_of_the_threads(mistakes, kernel: str, seed: int):
    done = subprocess.run([mistakes, kernel, str(seed)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith(f"{kernel}: ") and MISTAKES[kernel] in done.stdout


@pytest.mark.parametrize("kernel", sorted(set(MISTAKES) - {"too_much_dynamic"}))
def test_the_report_names_the_line(mistakes, kernel: str):
    done = subprocess.run([mistakes, kernel, "0"], capture_output=True, text=True, timeout=60)
    text = (HERE / "mistakes.cu").read_text()
    begin = text[: text.index(f"GPU_KERNEL({kernel},")].count("\n") + 1
    place, line = done.stdout.removeprefix(f"{kernel}: ").split(":")[:2]
    assert place.endswith("mistakes.cu")
    assert begin <= int(line) < begin + 9


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sound_kernel_computes_what_it_should(mistakes, seed: int):
    done = subprocess.run([mistakes, "sound", str(seed)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [int(value) for value in done.stdout.split()] == [(i ^ 1) + 1 for i in range(64)]
