"""The compiled library under test."""

import os
from pathlib import Path

import pytest

from dit2deploy.base.errors import Misuse
from dit2deploy.targets import kernel
from tests.plugins.compiling import PLUGINS, compile_cpp


@pytest.fixture(scope="session")
def library() -> Path:
    try:
        return kernel.library_path()
    except Misuse as error:
        pytest.skip(error.cause)


@pytest.fixture(scope="session")
def driver(library) -> Path:
    """The driver's libcuda.so.1 over the emulator."""
    path = Path(os.environ.get("D2D_TEST_LIBRARIES", library.parent)) / "driver" / "libcuda.so.1"
    if not path.is_file():
        pytest.skip(f"{path} was not built")
    return path


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Path:
    """The emulator as an object file, for programs that run changed kernels."""
    source = PLUGINS / "cuda_on_host" / "emulator.cc"
    out = tmp_path_factory.mktemp("emulator") / "emulator.o"
    return compile_cpp(out, [source], "-O1", "-c", folders=("base", "cuda", "cuda_on_host"))
