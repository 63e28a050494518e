"""Compiles the C++ programs of these tests."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PLUGINS = HERE.parents[1] / "plugins"


def compile_cpp(out: Path, sources: Sequence[Path], *options: str, folders: Sequence[str] = ()) -> Path:
    """The program `out`; skips where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    includes = [f"-I{PLUGINS / folder}" for folder in folders]
    # -x c++: some of the sources are CUDA's.
    command = [compiler, "-std=c++17", "-Wall", *includes, *options, "-x", "c++", *map(str, sources), "-x", "none"]
    done = subprocess.run([*command, "-o", str(out), "-ldl", "-pthread"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out
