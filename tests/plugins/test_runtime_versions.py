"""The same binary under other builds of ONNX Runtime: test_native_entries.py once more, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Folders made by `pip install --target`; `make test` makes the first.
RUNTIMES = (("onnxruntime 1.18", "D2D_OLD_ORT", r"1\.18\."), ("onnxruntime-gpu", "D2D_GPU_ORT", r""))


@pytest.mark.parametrize(("name", "variable", "version"), RUNTIMES, ids=[name for name, _, _ in RUNTIMES])
def test_the_entries_pass_their_tests_under(name, variable, version, library):
    folder = os.environ.get(variable)
    if not folder or not (Path(folder) / "onnxruntime").is_dir():
        pytest.skip(f"${variable} names no folder with {name} (pip install --target)")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((folder, str(ROOT))),
        "DIT2DEPLOY_LIBRARY": str(library),
    }
    asked = subprocess.run(
        [sys.executable, "-c", "import onnxruntime; print(onnxruntime.__version__, onnxruntime.__file__)"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert asked.returncode == 0, asked.stderr
    assert re.match(version, asked.stdout) and folder in asked.stdout, asked.stdout
    # Without tests/conftest.py, which needs torch and the whole package: only the adapter is at stake.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib"),
            *(f"--rootdir={ROOT}", f"--confcutdir={Path(__file__).parent}"),
            str(Path(__file__).with_name("test_native_entries.py")),
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    tail = done.stdout[-4000:] + done.stderr[-2000:]
    assert done.returncode == 0, tail
    assert re.search(r"\b\d{2,} passed", done.stdout), tail
