"""The emulator sees the mistakes that a GPU would forgive today and punish tomorrow."""

import subprocess

import numpy as np
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
    "copy_read_before_the_wait": "touches bytes of a copy_async that was not waited for",
    "wait_one_too_weak": "touches bytes of a copy_async that was not waited for",
    "copy_read_without_a_barrier": "a barrier is missing",
    "copy_over_what_is_read": "overwrites what another thread may still read",
    "copy_never_waited_for": "ends with a copy_async that was not waited for",
    "copy_never_committed": "ends with a copy_async that was not committed",
    "copy_out_of_bounds": "touches element 64 of a shared array of 64",
    "copy_from_outside": "touches global memory outside of every tensor",
    "global_out_of_bounds": "touches global memory outside of every tensor",
    "global_misaligned": "touches global memory at an address that is no multiple of its size",
    "matrix_of_unwritten_rows": "reads shared memory that nobody wrote",
    "matrix_out_of_bounds": "of a shared array of 32",
    "divergent_product": "wait in different warp operations",
    "leaves_before_a_product": "waits for ever for threads that have left",
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
    assert begin <= int(line) < begin + 11


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sound_kernel_computes_what_it_should(mistakes, seed: int):
    done = subprocess.run([mistakes, "sound", str(seed)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [int(value) for value in done.stdout.split()][:64] == [(i ^ 1) + 1 for i in range(64)]


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_that_are_waited_for_arrive(mistakes, seed: int):
    """A valid copy brings the zeros of the output, one that is not valid brings zeros."""
    done = subprocess.run([mistakes, "sound_copies", str(seed)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [int(value) for value in done.stdout.split()][:64] == [1] * 64


@pytest.mark.parametrize("seed", SEEDS)
def test_a_product_of_fragments_is_the_product_of_the_matrices(mistakes, seed: int):
    done = subprocess.run([mistakes, "product", str(seed)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    k = np.arange(32)
    a = np.arange(16)[:, None] + 3 * k - 40
    b = 5 * np.arange(8)[None] - k[:, None]
    np.testing.assert_array_equal(np.array(done.stdout.split(), int).reshape(16, 8), a @ b)


def test_a_product_of_int4_fragments_is_the_product_of_the_matrices(mistakes):
    done = subprocess.run([mistakes, "product_of_nibbles", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    k = np.arange(64)
    a = (np.arange(16)[:, None] + 3 * k) % 16 - 8
    b = (5 * np.arange(8)[None] - k[:, None]) % 16 - 8
    np.testing.assert_array_equal(np.array(done.stdout.split(), int).reshape(16, 8), a @ b)
