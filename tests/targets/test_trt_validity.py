"""What is said of an engine that cannot be opened here, before it is loaded."""

import enum
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.bundle import MANIFEST, Bundle
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import listen
from dit2deploy.targets import cuda, kernel, tensorrt, tensorrt_rtx, trt_build, trt_runner
from dit2deploy.targets.trt_engine import MAGIC, read_header
from dit2deploy.targets.trt_validity import check_release, check_validity

ABLE = tensorrt_rtx.availability()
builds = pytest.mark.skipif(not ABLE.can_build, reason=f"tensorrt-rtx: {ABLE.reason}")
Validity = enum.Enum("Validity", "VALID SUBOPTIMAL INVALID")
# Names and values of tensorrt_rtx.EngineInvalidityDiagnostics, which a test compares.
BITS = {
    "VERSION_MISMATCH": 1,
    "UNSUPPORTED_CC": 2,
    "OLD_CUDA_DRIVER": 4,
    "OLD_CUDA_RUNTIME": 8,
    "INSUFFICIENT_GPU_MEMORY": 16,
    "MALFORMED_ENGINE": 32,
    "CUDA_ERROR": 64,
}
MADE_UP = SimpleNamespace(
    __version__="1.8.0.1", EngineValidity=Validity, EngineInvalidityDiagnostics=enum.Enum("Diagnostics", BITS)
)


@pytest.fixture
def engine(tmp_path):
    """A file with a header of TensorRT-RTX 1.7.1.116 for 8.6 and 8.9, and a body."""
    path = tmp_path / "x.engine"
    header = bytearray(64)
    header[:4], header[16:24], header[24:28], header[32] = MAGIC, (100).to_bytes(8, "little"), bytes((1, 7, 1, 116)), 12
    path.write_bytes(bytes(header) + bytes(36))
    return path


def check(engine, validity: Validity, bits: int) -> list[str]:
    asked, notes = [], []

    def get_engine_validity(header: bytes):
        asked.append(header)
        return validity, bits

    stop = listen(lambda what, done, total: notes.append(what))
    try:
        check_validity(
            MADE_UP, SimpleNamespace(get_engine_validity=get_engine_validity, engine_header_size=64), engine, "12.0"
        )
    finally:
        stop()
    assert asked == [engine.read_bytes()[:64]]  # no more is read of a file of gigabytes
    return notes


@pytest.mark.parametrize(
    ("bits", "fault", "cure"),
    (
        (1, "it is of another release. ", "Build the bundle anew with the installed one."),
        (2, "it is for other GPUs than this one. ", "Build with `--compute-capability` of this GPU."),
        (4 + 8, "the NVIDIA driver is too old; the CUDA runtime is too old. ", "Install a newer driver."),
        (16, "the GPU has too little memory. ", "Free memory of the GPU, or take a larger one."),
        (32, "the file is no engine, or a broken one. ", "Build the bundle anew."),
        (64, "CUDA does not work here. ", "Look at `nvidia-smi`, and install the driver anew."),
        (0, "it tells no reason. ", "Look at `nvidia-smi`, and build the bundle anew."),
    ),
)
def test_an_engine_that_is_not_for_this_machine_is_told_in_words(engine, bits: int, fault: str, cure: str):
    with pytest.raises(Misuse) as caught:
        check(engine, Validity.INVALID, bits)
    assert caught.value.cause == (
        f"{engine}: TensorRT-RTX 1.8.0.1 does not open it on this GPU, of compute capability 12.0: {fault}"
        "The file was built by 1.7.1.116 for 8.6, 8.9."
    )
    assert caught.value.cure == cure


def test_an_engine_that_is_not_at_its_best_is_opened_with_a_note(engine):
    (told,) = check(engine, Validity.SUBOPTIMAL, 8)
    assert told == f"{engine}: is not at its best on this GPU: the CUDA runtime is too old"
    assert check(engine, Validity.VALID, 0) == []


@builds
def test_the_real_runtime_is_asked(sample, tmp_path):
    """Without a GPU no engine is valid; a file that is none is told apart even so. In a process: importing TensorRT-RTX
    here would end the tests that show that nothing imports it."""
    record = tensorrt_rtx.build(sample.onnx, root=tmp_path, options={"compute_capabilities": ("8.6", "8.9")})
    (name,) = record.engines.values()
    header = read_header(tmp_path / name)
    assert record.versions["tensorrt-rtx"] == header["tensorrt"]
    (tmp_path / "none.engine").write_bytes(b"onnx" * 100)
    code = f"""
import sys, tensorrt_rtx as trt
from pathlib import Path
from dit2deploy.base.errors import Misuse
from dit2deploy.targets.trt_validity import check_validity
assert {{n: int(m.value) for n, m in trt.EngineInvalidityDiagnostics.__members__.items()}} == {BITS}
for path in sys.argv[1:]:
    try:
        check_validity(trt, trt.Runtime(trt.Logger(trt.Logger.ERROR)), Path(path), "8.6")
    except Misuse as error:
        print("told:", error.cause.partition("capability 8.6: ")[2])
"""
    command = [sys.executable, "-c", code, tmp_path / name, tmp_path / "none.engine"]
    environment = trt_build.environment("tensorrt_rtx", tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("told: ")]
    assert lines == [
        f"told: it tells no reason. The file was built by {header['tensorrt']} for 8.6, 8.9.",
        "told: the file is no engine, or a broken one. "
        f"{tmp_path}/none.engine: is no TensorRT engine, or a truncated one.",
    ], done.stderr


@pytest.fixture(params=("tensorrt", "tensorrt-rtx"))
def bundle(request, sample, tmp_path, engine) -> Bundle:
    """A bundle whose engine, for 9.0, release 10.13.3.9 built; nothing that opens it is looked at."""
    target = {"tensorrt": tensorrt, "tensorrt-rtx": tensorrt_rtx}[request.param].TARGET
    made = sample.bundle(by_files(target.name, engine), tmp_path / "bundle")
    record = made.target(target.name).model_copy(update={"versions": {target.name: "10.13.3.9"}})
    schema.save(made.manifest.model_copy(update={"targets": {target.name: record}}), made.folder / MANIFEST)
    return Bundle.load(made.folder)


def by_files(name: str, engine) -> SimpleNamespace:
    """A target that writes two files."""

    def build(onnx, *, root, options):
        (root / name).mkdir()
        files = {"x.engine": engine.read_bytes(), kernel.LIBRARY_NAME: b"a library"}
        for file, content in files.items():
            (root / name / file).write_bytes(content)
        return tensorrt.TargetRecord(
            engines={"sm90": f"{name}/x.engine"},
            files=tuple(f"{name}/{file}" for file in files),
            weight_bytes=1,
            details={"engines": {"sm90": {"compute_capabilities": ["9.0"]}}},
        )

    return SimpleNamespace(name=name, build=build)


@pytest.mark.parametrize("installed", ("10.13.3.10", "10.13.2.9", "11.0.0.1"))
def test_an_engine_of_another_release_is_told_before_it_is_opened(bundle, monkeypatch, installed: str):
    (target,) = bundle.manifest.targets
    runtime = SimpleNamespace(__version__=installed)
    monkeypatch.setattr(cuda, "capability", lambda: "9.0")
    monkeypatch.setattr(trt_runner.importlib, "import_module", lambda module: runtime)
    with pytest.raises(Misuse) as caught:
        trt_runner.open_runner(bundle, target, module=target.replace("-", "_"), values=(), cure="")
    assert caught.value.cause == (
        f"{bundle.folder}: its engines were built by {target} 10.13.3.9, installed is {installed}; an engine opens "
        "only in the release that built it."
    )
    assert f"pip install '{target}==10.13.3.9'" in caught.value.cure


def test_a_suffix_of_the_wheel_is_no_other_release(bundle):
    (target,) = bundle.manifest.targets
    check_release(bundle, target, "10.13.3.9.post1")
