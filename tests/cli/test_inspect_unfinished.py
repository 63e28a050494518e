"""`inspect` of what a stopped run left: what is done, what is missing, and a command that goes on."""

import json
import shlex

import pytest

from dit2deploy.base import progress
from dit2deploy.cli import main
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.finetune import Settings, finetune
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.search import search
from tests.stages.tiny_bundle import tiny_bundle


def explained(capsys, path) -> tuple[dict, str]:
    found = []
    for words in (("--json",), ()):
        main(["inspect", str(path), *words])
        found.append(capsys.readouterr().out)
    return json.loads(found[0]), " ".join(found[1].replace("\u2502", " ").split())


def stopped_at(what: str, when: int, run) -> None:
    """Runs until the progress of `what` is `when`."""

    def stop(told: str, done: int, total: int | None) -> None:
        if told == what and done == when:
            raise KeyboardInterrupt

    remove = progress.listen(stop)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run()
    finally:
        remove()


def test_calibrate_and_quantize(capsys, tmp_path, tiny_dit_folder):
    out = tmp_path / "my set"
    command = ["calibrate", str(tiny_dit_folder), "--samples", "1", "--steps", "4", "-q", "-o", str(out)]
    stopped_at("calibrate", 3, lambda: main(command))
    values, text = explained(capsys, out)
    assert values["kind"] == "unfinished" and "3 of 4 steps are done" in text
    assert values["unfinished"][0]["command"] == shlex.join(["dit2deploy", *command])
    main(shlex.split(values["unfinished"][0]["command"])[1:])
    capsys.readouterr()
    values, text = explained(capsys, out)
    assert values["kind"] == "calibration_set" and values["unfinished"] == [] and "unfinished" not in text

    policy, packed = tmp_path / "policy.json", tmp_path / "packed"
    layers = search(tiny_dit_folder, policy, recipe="w4a8").layers
    quantized = [name for name, layer in layers.items() if layer.is_quantized]
    command = ["quantize", str(tiny_dit_folder), "--policy", str(policy), "--calibration", str(out), "-o", str(packed)]
    stopped_at("quantize", 5, lambda: main([*command, "-q"]))
    capsys.readouterr()
    values, text = explained(capsys, packed)
    found = values["unfinished"][0]
    assert (found["done"], found["total"]) == (5, len(quantized)) and f"5 of {len(quantized)} layers" in text
    assert len(found["missing"]) == len(quantized) - 5 and set(found["missing"]) < set(quantized)
    assert f"and {len(quantized) - 5 - 8} more" in text
    main(shlex.split(found["command"])[1:])
    capsys.readouterr()
    assert explained(capsys, packed)[0]["unfinished"] == []


def test_compile_and_the_stage_it_was_in(capsys, tmp_path, tiny_dit_folder):
    out = tmp_path / "bundle"
    command = ["compile", str(tiny_dit_folder), "--samples", "1", "--steps", "2", "-q", "-o", str(out)]
    stopped_at("quantize", 4, lambda: main(command))
    values, text = explained(capsys, out)
    stages = {record["stage"]: record for record in values["unfinished"]}
    assert (stages["compile"]["done"], stages["compile"]["total"]) == (2, 9)
    assert stages["compile"]["missing"][0] == "quantize" and stages["compile"]["missing"][-1] == "report"
    assert stages["quantize"]["done"] == 4 and stages["quantize"]["command"] == shlex.join(["dit2deploy", *command])
    assert "2 of 9 stages" in text and "4 of 19 layers" in text


def test_a_training(capsys, tmp_path, tiny_dit_folder, tiny_policy):
    calibration = calibrate(tiny_dit_folder, tmp_path / "set", samples=1, steps=2)
    checkpoint = quantize(tiny_dit_folder, tiny_policy, calibration, tmp_path / "checkpoint")
    run = {"calibration": calibration, "settings": Settings(steps=6, batch=2, trajectories=1), "save_every": 2}
    out = tmp_path / "trained"
    stopped_at("finetune", 5, lambda: finetune(tiny_dit_folder, checkpoint, out, **run))
    values, text = explained(capsys, out)
    assert values["unfinished"][0]["done"] == 4 and "4 of 6 steps" in text
    assert "the same call of the library" in text


def test_the_journal_of_a_search(capsys, tmp_path, tiny_dit_folder):
    calibration = calibrate(tiny_dit_folder, tmp_path / "set", samples=1, steps=2)
    out = tmp_path / "policy.json"
    search(tiny_dit_folder, out, recipe="hawq", calibration=calibration, items=2)
    journal = tmp_path / "policy.journal.jsonl"
    values, text = explained(capsys, journal)
    assert values["measurements"] == len([line for line in journal.read_text().splitlines() if line]) > 0
    assert "the same `dit2deploy search`" in text


def test_a_bundle_without_its_evidence(capsys, tmp_path):
    bundle = tiny_bundle(tmp_path)
    _, text = explained(capsys, bundle.folder)
    for name, how in (("parity.json", "parity"), ("profile.json", "profile"), ("report.html", "report")):
        assert f"{name} not yet: dit2deploy {how}" in text
    (bundle.folder / "parity.json").write_text("{}")
    assert "dit2deploy parity" not in explained(capsys, bundle.folder)[1]
