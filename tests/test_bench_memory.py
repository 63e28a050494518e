"""A case of the memory benchmark is made by one command, goes on where it was stopped, and leaves no large folder."""

import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# In place of a stage: says what it was given, wants every path it reads, writes its output; fails where it is told to.
STAND_IN = """
import pathlib, sys
words = sys.argv[1:]
log, trip = pathlib.Path("log"), pathlib.Path("trip")
log.open("a").write(" ".join(words) + "\\n")
out = words[words.index("-o") + 1] if "-o" in words else words[1]
for word in words:
    if word.startswith("work/") and word != out and not pathlib.Path(word).exists():
        sys.exit(f"no {word}")
if words[0] == "build" and not pathlib.Path(words[1]).with_name("checkpoint").exists():
    sys.exit("no checkpoint to take the policy from")
if trip.exists() and words[0] == trip.read_text():
    sys.exit(3)
out = pathlib.Path(out)
out.parent.mkdir(parents=True, exist_ok=True)
if out.suffix != ".json":
    out.mkdir(parents=True)
    out = out / "weights"
out.write_bytes(bytes(7))
"""


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """The benchmark in an empty folder, with a stand-in for the command line and for the writer of models."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("bench_memory")
    monkeypatch.chdir(tmp_path)
    Path("stand_in.py").write_text(STAND_IN)
    for name in ("CLI", "WRITE_MODEL"):
        monkeypatch.setattr(module, name, (sys.executable, "stand_in.py"))
    return module


def run(tool, line: str) -> dict:
    tool.main(tool.parsed([*shlex.split(line), "--work", "work", "--results", "memory.json"]))
    return json.loads(Path("memory.json").read_text())["cases"]


def test_recipes_share_the_model_and_only_bundles_stay(tool):
    line = "flux.1-dev --layers 2,4 --recipe w1.58a4 --recipe w4a4 --rounding nearest --max-memory 3GB"
    case = run(tool, line)["flux.1-dev 2+4"]
    lines = Path("log").read_text().splitlines()
    stages = ["search", "quantize", "export", "build"]
    assert [line.split()[0] for line in lines] == ["flux.1-dev", "calibrate", *stages, *stages]
    assert lines[0].endswith("--layers 2,4")
    assert "--rounding nearest" in lines[2] and sum("--max-memory 3GB" in line for line in lines) == 5
    left = {path.parent.relative_to("work/flux.1-dev-2-4").as_posix() for path in Path("work").rglob("weights")}
    assert left == {"w1.58a4/bundle", "w4a4/bundle"}
    assert case["model"]["out_bytes"] == case["recipes"]["w4a4"]["export"]["out_bytes"] == 7
    assert case["command"] == f"python tools/bench_memory.py {line}"


def test_a_stopped_case_goes_on_and_adds_up_its_runs(tool):
    line = "wan2.1-t2v-14b --random-checkpoint --until export"
    Path("trip").write_text("export")
    with pytest.raises(SystemExit, match=r"w1.58a4 export failed"):
        run(tool, line)
    Path("trip").unlink()
    case = run(tool, line)["wan2.1-t2v-14b, random checkpoint"]
    assert [line.split()[0] for line in Path("log").read_text().splitlines()] == ["wan2.1-t2v-14b", "export", "export"]
    made = case["recipes"]["w1.58a4"]
    assert made["export"]["runs"] == 2 and made["export"]["exit"] == 0 and made["model"]["runs"] == 1
    with pytest.raises(SystemExit, match="made otherwise"):
        run(tool, f"{line} --max-memory 2GB")
    longer = run(tool, "wan2.1-t2v-14b --random-checkpoint")["wan2.1-t2v-14b, random checkpoint"]
    assert longer["recipes"]["w1.58a4"]["build"]["exit"] == 0
    assert longer["command"].endswith("--random-checkpoint --recipe w1.58a4")


def test_the_recorded_command_is_the_case(tool):
    for case in json.loads((ROOT / "tools/results/memory.json").read_text())["cases"].values():
        if case["command"] is None:
            assert case["note"]
            continue
        assert "/work" not in case["command"] and "/tmp" not in case["command"]
        options = tool.parsed(shlex.split(case["command"])[2:])
        assert tool.command_of(options) == case["command"]
        assert options.recipe == list(case["recipes"])
