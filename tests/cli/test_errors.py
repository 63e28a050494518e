"""Bad input: one message with cause and cure, the right exit code, no traceback, nothing written."""

import errno
import json
import shutil

import pytest

from dit2deploy.cli import COMMANDS, group, main, options


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
        raise SystemExit(0)
    printed = capsys.readouterr()
    code = stopped.value.code
    return 0 if code is None else int(code), printed.out, printed.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_the_common_options(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert f"dit2deploy {name}" in out.split("Options:")[0].split("Usage:")[1].split("\n", 1)[1]
    for option in ("--json", "--seed", "-q", "-v"):
        assert option in out


def test_the_group_lists_every_command(capsys):
    _, out, _ = run(capsys, "--help")
    for name in COMMANDS:
        assert f"\n  {name} " in out
    assert group.list_commands(None) == list(COMMANDS)


def check(result: tuple[int, str, str], *texts: str, code: int = 2) -> None:
    assert result[0] == code, result
    assert result[1] == ""
    assert "Traceback" not in result[2]
    lines = [line for line in result[2].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result[2]
    assert "\n  -> " in result[2]
    for text in texts:
        assert text in result[2]


def test_usage(capsys):
    check(run(capsys, "nonsense"), "No such command")
    check(run(capsys, "sample", "bundle"), "Missing option")
    check(run(capsys, "sample", "bundle", "-o", "a.png"), "Give --label or --prompts")
    check(run(capsys, "sample", "bundle", "--label", "x", "-o", "a.png"), "not a valid integer")
    check(run(capsys, "build", "onnx", "--range", "batch=1:2", "-o", "out"), "'batch=1:2' is no range")
    check(
        run(capsys, "build", "onnx", "--range", "batch=1:2:4", "-o", "out"), "--range is for tensorrt-rtx and tensorrt"
    )


@pytest.mark.parametrize("command", ["compile", "calibrate", "search"])
def test_a_model_that_is_not_there(capsys, tmp_path, command):
    out = tmp_path / "out"
    check(run(capsys, command, tmp_path / "nowhere", "-o", out), "nowhere")
    assert not out.exists()


def test_a_truncated_model(capsys, tmp_path, tiny_dit_folder):
    model = shutil.copytree(tiny_dit_folder, tmp_path / "model")
    weights = next((model / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    check(run(capsys, "calibrate", model, "--samples", "1", "--steps", "2", "-o", tmp_path / "out"), "truncated")
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_never_loaded(capsys, tmp_path, tiny_dit_folder):
    model = shutil.copytree(tiny_dit_folder, tmp_path / "model")
    weights = next((model / "transformer").glob("*.safetensors"))
    weights.with_suffix(".bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    weights.unlink()
    check(run(capsys, "search", model, "-o", tmp_path / "policy.json"), "safetensors")


def test_an_unknown_architecture(capsys, tmp_path, tiny_dit_folder):
    model = shutil.copytree(tiny_dit_folder, tmp_path / "model")
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "os.system"}))
    check(run(capsys, "search", model, "-o", tmp_path / "policy.json"), "os.system")


def test_an_unknown_recipe(capsys, tmp_path, tiny_dit_folder):
    result = run(capsys, "search", tiny_dit_folder, "--recipe", "w5a5", "-o", tmp_path / "policy.json")
    check(result, "w5a5", "w1.58a4")
    assert not (tmp_path / "policy.json").exists()


@pytest.mark.parametrize("command", ["parity", "profile", "report"])
def test_a_bundle_that_is_not_there(capsys, tmp_path, command):
    check(run(capsys, command, tmp_path / "nowhere"), "no such file")


def test_inspect_of_something_else(capsys, tmp_path):
    check(run(capsys, "inspect", tmp_path), "no artefact")


def test_errors_as_json(capsys, tmp_path):
    code, _, err = run(capsys, "inspect", tmp_path, "--json")
    assert code == 2
    assert set(json.loads(err)) == {"error", "cure"}


def test_a_full_disk(capsys, tmp_path, tiny_dit_folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    check(run(capsys, "search", tiny_dit_folder, "-o", tmp_path / "policy.json"), "No space left")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["lots", "-1GB", "0", "8 apples"])
def test_a_ceiling_that_is_no_size(capsys, tmp_path, tiny_dit_folder, size):
    check(run(capsys, "calibrate", tiny_dit_folder, "--max-memory", size, "-o", tmp_path / "out"), "--max-memory")


@pytest.mark.parametrize("command", ["calibrate", "compile"])
def test_a_ceiling_that_cannot_be_kept(capsys, tmp_path, tiny_dit_folder, command):
    for more in ((), ("--dry-run",)):
        result = run(capsys, command, tiny_dit_folder, "--max-memory", "20MB", *more, "-o", tmp_path / "out")
        check(result, "a ceiling of 0.02 GB", "--max-memory")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["calibrate", "compile"])
def test_a_dry_run_tells_time_memory_and_disk_and_writes_nothing(capsys, tmp_path, tiny_dit_folder, command):
    code, out, _ = run(capsys, command, tiny_dit_folder, "--dry-run", "--json", "-o", tmp_path / "out")
    assert code == 0 and list(tmp_path.iterdir()) == []
    found = {one["stage"]: one for one in json.loads(out)["estimates"]}
    assert list(found) == (["calibrate"] if command == "calibrate" else ["calibrate", "quantize"])
    assert all(one["seconds"] > 0 and one["memory"] > 0 and one["disk"] > 0 for one in found.values())


def test_ctrl_c(capsys, tmp_path, tiny_dit_folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dit2deploy.stages.search.search", interrupted)
    check(run(capsys, "search", tiny_dit_folder, "-o", tmp_path / "policy.json"), "interrupted", code=130)


def test_a_bug_is_told_as_one(capsys, tmp_path, tiny_dit_folder, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("surprise")

    monkeypatch.setattr("dit2deploy.stages.search.search", broken)
    check(run(capsys, "search", tiny_dit_folder, "-o", tmp_path / "policy.json"), "surprise", "--traceback", code=1)


def test_tables_show_brackets_as_they_are(capsys):
    """The cure of a target names extras: pip install 'dit2deploy[cuda]'."""
    options.show({}, options.table("t", ("cure",), [("pip install 'dit2deploy[cuda]'",)]), as_json=False)
    assert "'dit2deploy[cuda]'" in capsys.readouterr().out
