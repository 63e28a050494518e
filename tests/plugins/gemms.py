"""What tests of the GEMMs' CUDA kernels share: weights, the emulated library, kernels with a mistake planted."""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dit2deploy.formats import TERNARY, Format, pack
from dit2deploy.targets import kernel
from tests.plugins.compiling import HERE, PLUGINS, compile_cpp

GEMM = PLUGINS / "ops" / "quant_gemm"
FOLDERS = ("base", "formats", "cuda", "cuda_on_host", "ops/quant_gemm")


def weights_of(fmt: Format, n: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(n + k)
    return rng.integers(-fmt.offset, fmt.levels - 1 - fmt.offset, (n, k), endpoint=True)


def in_fragments(fmt: Format, weights: np.ndarray, library: Path) -> np.ndarray:
    words = pack(weights, fmt)
    return kernel.relayout(fmt.name, words, weights.shape[1], layout=kernel.FRAGMENT_ORDER, library=library)


def on_host(library: Path) -> Path:
    path = Path(os.environ.get("D2D_TEST_LIBRARIES", library.parent)) / "libdit2deploy_host_cuda.so"
    if not path.is_file():
        pytest.skip(f"{path} was not built")
    return path


def never_launched(host: Path) -> set[str]:
    """Names of the kernels that this copy of the library did not launch yet."""
    names = ctypes.CDLL(str(host)).d2d_never_launched
    names.restype = ctypes.c_char_p
    return set(names().decode().split())


class Planted:
    """Builds and runs one_gemm.cc around kernels that were changed: ternary, tokens, outputs and K ragged, a branch."""

    def __init__(self, folder: Path, *objects: Path) -> None:
        one = compile_cpp(folder / "one_gemm.o", [HERE / "one_gemm.cc"], "-O1", "-c", folders=FOLDERS)
        self.same = [str(one), *map(str, objects)]

    def run(self, folder: Path, sources: dict[str, str], how: str, k: int, library: Path) -> tuple[int, str]:
        """Exit code and report; `sources` by name, headers and one .cu, `how` and `k` as one_gemm takes them."""
        for name, text in sources.items():
            (folder / name).write_text(text)
        options = ("-O1", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Wno-unused-function", f"-I{folder}")
        kernels = [folder / name for name in sources if name.endswith(".cu")]
        program = compile_cpp(folder / "one_gemm", kernels, *options, *self.same, folders=FOLDERS)
        weights = weights_of(TERNARY, 70, k)
        in_fragments(TERNARY, weights, library).tofile(folder / "words")
        (weights @ (1 + np.arange(k) // 64)).astype(np.float32).tofile(folder / "sums")
        command = [program, folder / "words", folder / "sums", str(k), how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout


def changed(names: Sequence[str], old: str, new: str) -> dict[str, str]:
    """The named sources of the GEMMs with the first `old` in one of them changed."""
    texts = {name: (GEMM / name).read_text() for name in names}
    holder = next(name for name in names if old in texts[name])
    return {**texts, holder: texts[holder].replace(old, new, 1)}


def judge(code: int, report: str, expected: str) -> None:
    """AssertionError where the emulator did not say what it should, or anything to a sound kernel."""
    if not expected:
        assert (code, report) == (0, "")
    else:
        assert code == 1 and expected in report, report
