"""The emulated wgmma: products by every descriptor that the PTX ISA knows, and a report on what breaks its rules."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.plugins.compiling import HERE, PLUGINS, compile_cpp

FOLDERS = ("base", "cuda", "cuda_on_host")
SEEDS = range(3)
LAYOUTS = range(7)  # in wgmma.cu: without a swizzle, of 128 bytes from k 0, 32 and 96, of 64 from k 0 and 32, of 32
MISTAKES = {
    "sums_read_before_the_wait": "reads sums of a wgmma that was not waited for",
    "wait_for_too_few": "reads sums of a wgmma that was not waited for",
    "never_committed": "reads sums of a wgmma that was not waited for",
    "rows_changed_before_the_wait": "changes registers of a wgmma that was not waited for",
    "registers_left": "leaves registers of a wgmma that was not waited for",
    "registers_not_fenced": "multiplies registers that were written and not fenced since",
    "registers_changed_after_the_fence": "multiplies registers that were written and not fenced since",
    "shared_memory_not_fenced": "without fence_async_proxy before the barrier",
    "fenced_after_the_barrier": "without fence_async_proxy before the barrier",
    "copies_not_fenced": "without fence_async_proxy before the barrier",
    "no_barrier": "(a barrier is missing)",
    "overwritten_before_the_wait": "overwrites what a wgmma may still read",
    "overwritten_without_a_barrier": "overwrites what",
    "other_matrices": "name different matrices",
    "unwritten_columns": "multiplies shared memory that nobody wrote",
    "outside": "multiplies bytes outside of every shared array",
    "off_its_atom": "does not begin with a row of its swizzle",
    "base_offset": "a base offset",
    "one_warp_left": "waits for ever for threads that have left",
    "one_warp_elsewhere": "wait in different warp operations",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory, emulator) -> Path:
    sources = [HERE / "wgmma.cu", PLUGINS / "cuda_on_host" / "wgmma_on_host.cc"]
    options = ("-O1", "-Wno-unused-value", str(emulator))
    return compile_cpp(tmp_path_factory.mktemp("wgmma") / "wgmma", sources, *options, folders=FOLDERS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_products_are_twice_the_product_of_the_matrices(program, layout: int, seed: int):
    done = subprocess.run([program, "sound", str(seed), str(layout)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    k = np.arange(32)
    a = (7 * np.arange(64)[:, None] + 3 * k).astype(np.int8).astype(int)
    b = (5 * np.arange(24)[:, None] - k).astype(np.int8).astype(int)
    np.testing.assert_array_equal(np.array(done.stdout.split(), int).reshape(64, 24), 2 * a @ b.T)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", MISTAKES)
def test_a_mistake_is_reported_in_any_order_of_the_threads(program, kernel: str, seed: int):
    done = subprocess.run([program, kernel, str(seed), "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith(f"{kernel}: ") and MISTAKES[kernel] in done.stdout
