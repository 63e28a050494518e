"""compile() on a tiny random DiT: everything is there, a second run keeps it all, a stop is taken up where it was."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dit2deploy.artefacts.bundle import PARITY, PROFILE, REPORT, Bundle, Thresholds
from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.base import progress
from dit2deploy.base.errors import Misuse
from dit2deploy.cli import main
from dit2deploy.cli.compile import summary
from dit2deploy.demo import PATH
from dit2deploy.pipeline import compile
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.sample import sample
from dit2deploy.stages.search import search
from dit2deploy.targets import by_name
from tests.packing import COMPILE as SETTINGS

STAGES = ("calibrate", "search", "quantize", "export", "export float", "build", "parity", "profile", "report")


def kept(run) -> list[str]:
    """Stages that `run` did not do again."""
    notes: list[str] = []
    stop = progress.listen(lambda what, done, total: notes.append(what) if total == 0 else None)
    try:
        run()
    finally:
        stop()
    return [note.partition(":")[0] for note in notes if note.endswith("done before, kept")]


@pytest.fixture
def made(tiny_dit_folder, compiled):
    return tiny_dit_folder, compiled


def with_work_of(out: Path, folder: Path, *left_out: str) -> Path:
    """The bundle to be made in `folder`, with what lies in the work folder of `out`: compile keeps what serves it."""
    work = out.with_name(f"{out.name}.work")
    shutil.copytree(work, folder / "bundle.work", ignore=shutil.ignore_patterns(*left_out))
    return folder / "bundle"


def test_the_bundle_is_whole(made):
    _, out = made
    bundle = Bundle.load(out)
    assert set(bundle.manifest.targets) == {"ort-cpu"}
    assert bundle.manifest.size.ratio > 2
    assert json.loads((out / PARITY).read_text())["status"] == "passed"
    assert {row["name"] for row in json.loads((out / PROFILE).read_text())["latency"]} >= {"engine", "ort-fp32"}
    assert "<html" in (out / REPORT).read_text()


def test_the_bundle_draws(made, tmp_path):
    _, out = made
    first = sample(out, tmp_path / "a.png", labels=[1, 2], steps=2, seed=5)
    again = sample(out, tmp_path / "b.png", labels=[1, 2], steps=2, seed=5)
    other = sample(out, tmp_path / "c.png", labels=[1, 2], steps=2, seed=6)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_second_run_keeps_everything(made):
    model, out = made
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    assert kept(lambda: compile(model, out, **SETTINGS)) == list(STAGES)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == before


def test_a_stopped_run_goes_on_where_it_was(made, monkeypatch, memory_not_measured):
    model, out = made
    (out / PROFILE).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("dit2deploy.stages.profile.profile", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            compile(model, out, **SETTINGS)
    assert not (out / PROFILE).exists()
    assert set(kept(lambda: compile(model, out, **SETTINGS))) >= set(STAGES) - {"profile", "report"}
    assert (out / PROFILE).exists()


def _interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_changed_bundle_is_an_error_and_not_built_upon(made):
    model, out = made
    path = out / "config.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole + b" ")
        with pytest.raises(Misuse, match=r"config\.json.*hash mismatch"):
            compile(model, out, **SETTINGS)
    finally:
        path.write_bytes(whole)


def test_a_checkpoint_takes_the_place_of_search_and_quantize(made, tmp_path, memory_not_measured):
    """One whose activations have 1 and 2 bits, on a mid-rise grid."""
    model, out = made
    calibration = CalibrationSet.load(out.with_name(f"{out.name}.work") / "calibration")
    policy = search(model, tmp_path / "policy.json", recipe="w1.58a4", activation_bits=2)
    every = {
        name: layer.model_copy(update={"activation_bits": (1,)}) if name.endswith("ff.net.2") else layer
        for name, layer in policy.layers.items()
    }
    assert {(layer.activation_bits, layer.grid) for layer in every.values() if layer.low_rank} == {
        ((1,), "mid-rise"),
        ((2,), "mid-rise"),
    }
    made_here = quantize(model, policy.model_copy(update={"layers": every}), calibration, tmp_path / "checkpoint")
    given = {"checkpoint": made_here.folder, "calibration": calibration.folder}
    new = with_work_of(out, tmp_path, "policy.json", "checkpoint", "onnx")
    bundle = compile(model, new, **given, **SETTINGS)
    assert bundle.manifest.provenance["checkpoint_sha256"] == made_here.sha256
    assert not (tmp_path / "bundle.work" / "policy.json").exists()
    assert json.loads((tmp_path / "bundle" / PARITY).read_text())["status"] == "passed"


def test_a_checkpoint_of_another_model_is_told(made, tmp_path):
    _, out = made
    with pytest.raises(Misuse, match="was not made from"):
        compile(PATH, tmp_path / "bundle", checkpoint=out.with_name(f"{out.name}.work") / "checkpoint")


def test_a_target_that_cannot_be_built_is_told_before_work_starts(made, tmp_path, monkeypatch):
    model, _ = made
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(Misuse, match="tensorrt-rtx cannot be built here"):
        compile(model, tmp_path / "bundle", targets=["tensorrt-rtx"], **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_the_type_of_the_activations_is_the_builds_alone(made, tmp_path):
    """Engines are built anew in another type; all that they are made from is kept."""
    model, whole = made
    able = by_name("ort-cuda").availability()
    if not able.can_build or able.can_run:
        pytest.skip(f"ort-cuda must build here and not run: {able.reason or 'it runs'}")
    out = with_work_of(whole, tmp_path)

    def run(floats: str) -> tuple[Bundle, list[str]]:
        options = {} if floats == "float32" else {"ort-cuda": {"floats": floats}}
        done = kept(lambda: compile(model, out, targets=["ort-cuda"], options=options, **SETTINGS))
        return Bundle.load(out), done

    single, _ = run("float32")
    half, done = run("float16")
    assert done == list(STAGES[: STAGES.index("build")])
    found = [bundle.target("ort-cuda") for bundle in (single, half)]
    assert [record.details["floats"] for record in found] == ["float32", "float16"]
    assert (found[0].thresholds, found[1].thresholds) == (None, Thresholds.of_significand(11))
    assert run("float16")[1] == [*done, "build", "parity", "report"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    (
        (("--floats", "float16"), "target ort-cpu has no option floats"),
        (("--range", "batch=1:2:8"), "--range is for tensorrt-rtx and tensorrt"),
        (("--target", "tensorrt-rtx", "--floats", "bfloat16"), "compute capability 7.5 has no bfloat16"),
    ),
    ids=("floats", "range", "bfloat16"),
)
def test_what_the_build_would_refuse_is_refused_before_work_starts(made, tmp_path, capsys, arguments, told: str):
    if "tensorrt-rtx" in arguments and not by_name("tensorrt-rtx").availability().can_build:
        pytest.skip(by_name("tensorrt-rtx").availability().reason)
    with pytest.raises(SystemExit) as stopped:
        main(["compile", str(made[0]), *arguments, "-q", "-o", str(tmp_path / "bundle")])
    assert stopped.value.code == 2 and told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bundle_for_another_machine_is_built_without_measurements(made, tmp_path):
    model, whole = made
    able = by_name("tensorrt-rtx").availability()
    if not able.can_build or able.can_run:
        pytest.skip(f"tensorrt-rtx must build here and not run: {able.reason or 'it runs'}")
    out = with_work_of(whole, tmp_path)
    compile(model, out, targets=["tensorrt-rtx"], **SETTINGS)
    assert json.loads((out / PARITY).read_text())["status"] == "not run"
    assert not (out / PROFILE).exists()
    assert "<html" in (out / REPORT).read_text()
    values, _ = summary(out)
    assert values["speed"] is None and values["targets"]["tensorrt-rtx"]


def test_a_mixed_precision_recipe_measures_on_the_calibration_set(made, tmp_path, memory_not_measured):
    model, out = made
    settings = {"samples": 4, "steps": 4, "runs": 3, "recipe": "robuq-ampn"}
    bundle = compile(model, with_work_of(out, tmp_path), **settings)
    assert bundle.policy.method == "robuq-ampn"
    assert len({layer.activation_bits for layer in bundle.policy.layers.values()}) > 2
    assert (tmp_path / "bundle.work" / "policy.front.json").exists()
