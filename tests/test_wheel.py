"""What `pip wheel .` makes works in another environment: the command, its kernels, the demo model that it brings."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(runs dit2deploy as the wheel installs it, its package folder); dependencies are borrowed from here."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # Where this environment can build the wheel (Makefile), nothing is compiled anew; isolated, everything is.
    isolation = ["--no-build-isolation"] if find_spec("scikit_build_core") else []
    built = {"D2D_CUDA_CACHE": str(ROOT / "build" / "cuda-kernels"), **os.environ}
    making = [*pip, "wheel", *isolation, "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(making, check=True, cwd=folder, env=built)
    (wheel,) = folder.glob("dit2deploy-*.whl")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True, cwd=folder)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    # Through PYTHONPATH no .pth file of this environment is read: its editable dit2deploy stays out.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}

    def run(*arguments: str) -> str:
        command = [folder / "venv" / "bin" / "dit2deploy", *arguments]
        return subprocess.run(
            command, check=True, cwd=elsewhere, env=environment, stdout=subprocess.PIPE, text=True
        ).stdout

    return run, next((folder / "venv" / "lib").glob("python*/site-packages")) / "dit2deploy"


def test_the_command_finds_its_own_kernels(installed):
    run, package = installed
    ort_cpu = json.loads(run("targets", "--json"))["ort-cpu"]
    assert ort_cpu["can_build"] and ort_cpu["can_run"]
    assert list((package / "lib").glob("libdit2deploy*"))


def test_the_demo_model_travels(installed):
    run, package = installed
    assert json.loads(run("inspect", str(package / "demo"), "--json"))["class"] == "DiTTransformer2DModel"
    assert (package / "demo" / "w1.58a4" / "diffusion_pytorch_model.safetensors").stat().st_size < 3e6
