"""The table's rows are what they say, and a killed run goes on where it stopped."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import onnxruntime
import pytest
import torch

from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.base.errors import Misuse
from dit2deploy.demo import CLASSIFIER
from dit2deploy.models.dit import DIT
from dit2deploy.models.load import linears, load_transformer, open_model
from dit2deploy.nn.call import call_numpy
from dit2deploy.nn.convert import load_quantized
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.export import export
from dit2deploy.stages.quantize import quantize

SEARCHED = (
    "AMPN",
    "TSS",
    "AdaTSQ",
    "RobuQ, trained",
    "QueST-like",
    "low rank 16, trained",
    "TreeQ GMB, trained",
)  # slow, or a policy that another row has
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool():
    """The names of the tool and of its parts, as one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        names = ("methods.cases", "methods.rows", "methods.cells", "methods.claims", "methods.page", "methods_table")
        modules = [importlib.import_module(name) for name in names]
    names = {name: value for module in modules for name, value in vars(module).items()}
    return SimpleNamespace(**names, module=modules[-1])


@pytest.fixture(scope="module")
def model(tiny_dit_folder, tmp_path_factory):
    """The tiny pipeline with images of 16 x 16, which the demo's classifier reads, and a width of 64."""
    folder = tmp_path_factory.mktemp("tiny16")
    config = {**DIT.tiny, "sample_size": 16, "num_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    diffusers.DiTTransformer2DModel(**config).save_pretrained(folder / "transformer")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((tiny_dit_folder / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    return calibrate(model, tmp_path_factory.mktemp("calibration") / "set", samples=2, steps=2)


def arguments(model, out, *more: str) -> list[str]:
    small = ["--seeds", "2", "--samples", "3", "--steps", "2", "--calibration-samples", "2", "--threads", "1"]
    places = ["--model", str(model), "--classifier", str(CLASSIFIER), "--out", str(out)]
    return [*places, "--document", str(out / "methods.md"), *small, *more]


def column(tool, name: str):
    (found,) = tool.chosen(tool.COLUMNS, [name], "column")
    return found


def test_rows_of_tq_dit(tool, model, calibration, tmp_path):
    blocks = tool.block_linears(model)
    made = {}
    for row in tool.ROWS:
        if row.name.startswith("TQ-DiT"):
            made[row.name] = row.make(tool.Case(model, column(tool, "W6A6"), calibration, tmp_path, rank=2, seed=0))
            layers = [made[row.name].layers[name] for name in blocks]
            assert {(layer.weight_bits, max(layer.activation_bits)) for layer in layers} == {(6, 6)}
    assert made["TQ-DiT"].attentions and made["TQ-DiT"].has_regions
    assert not made["TQ-DiT, float attention"].attentions
    assert {layer.regions for layer in made["TQ-DiT, GELU by token"].layers.values()} == {"token"}
    assert made["TQ-DiT, 1 group"].timestep_bounds == (1000,)


def test_rows_are_what_they_say(tool, model, calibration, tmp_path):
    blocks = tool.block_linears(model)
    weights = {"W1.58A3": "ternary", "W3A3": "int3", "W4A4": "int4", "W6A6": "int8", "W1.58A4": "ternary"}
    made, around = {}, {}
    for row in tool.ROWS:
        at = next(name for name in weights if name in row.columns)
        bits = int(at[-1])
        if row.name in SEARCHED:
            continue
        policy = row.make(tool.Case(model, column(tool, at), calibration, tmp_path, rank=2, seed=0))
        policy.check_covers("DiTTransformer2DModel", linears(open_model(model)))
        made[row.name] = [policy.layers[name] for name in blocks]
        around[row.name] = policy.layers["transformer_blocks.0.norm1.linear"].weight
        assert {layer.weight for layer in made[row.name]} == {"int8" if row.name == "LRQ-DiT-like" else weights[at]}
        if row.name != "TR-DQ-like":  # its widths have a mean of 3
            assert {max(layer.activation_bits) for layer in made[row.name]} == {bits}
    assert around["branch V3"] == "int4" and around["branch V3, ternary modulation"] == "ternary"
    plain = LayerPolicy(weight="ternary", activation_bits=(3,))
    assert set(made["RTN"]) == {plain}
    assert {layer.clip for layer in made["RobuQ baseline"]} == {"absmax"}
    assert all(layer.hadamard >= 64 and layer.clip == "absmax" for layer in made["RTN + Hadamard"])
    assert all(layer.rounding == "gptq" and layer.low_rank == 0 for layer in made["QuaRot-like"])
    assert {layer.smoothing for layer in made["SmoothQuant"]} == {0.0, 0.5}
    assert {layer.branch_init for layer in made["RobuQ PTQ"]} == {"weight"}
    assert {layer.rounding for layer in made["RobuQ PTQ"]} == {"nearest"}
    assert {layer.grid for layer in made["branch V3"]} == {"mid-rise"}
    assert {layer.grid for layer in made["branch V3, mid-tread"] + made["RobuQ PTQ"]} == {"mid-tread"}
    assert {layer.hessian for layer in made["AdaTSQ GPTQ"]} == {"fisher"}
    assert {(layer.rounding, layer.smoothing_steps) for layer in made["PTQ4DiT"]} == {("adaround", "correlation")}
    assert {layer.smoothing for layer in made["PTQ4DiT"]} == {0.0, 0.5}
    assert {layer.objective for layer in made["PTQ4DiT + FIMA-Q objective"]} == {"low_rank"}
    assert all(layer.group_size and layer.low_rank == 2 for layer in made["SVDQuant-like"])
    budget = made["low rank 16"][0].low_rank
    for name in ("GMB 2 x 2", "GMB 4 x 4", "GMB 8 x 8", "low rank 8 + GMB", "GMB searched"):
        for layer in made[name]:  # of as many parameters, whatever N and K
            assert layer.low_rank + (layer.monarch.blocks_in * layer.monarch.rank if layer.monarch else 0) == budget
    assert all(len(layer.activation_bits) == 2 for layer in made["TR-DQ-like"])
    assert {layer.branch_init for layer in made["MPQ-DMv2-like"]} == {"salient"}
    assert {layer.smoothing for layer in made["LSGQuant-like"]} == {0.0, 1.0}
    assert {layer.log_bits for layer in made["LRQ-DiT-like"]} == {3}
    told = {json.dumps([layer.model_dump(mode="json") for layer in layers]) for layers in made.values()}
    alike = {"TQ-DiT", "TQ-DiT, 1 group", "TQ-DiT, float attention"}  # their layers are, but not the rest
    assert len(told) >= len(made.keys() - alike) + 1


@pytest.mark.parametrize(
    ("row", "at"),
    [
        ("Q-DiT-like", "W4A4"),
        ("LRQ-DiT-like", "W3A3"),
        ("TR-DQ-like", "W4A4"),
        ("LSGQuant-like", "W4A4"),
        ("TQ-DiT", "W6A6"),
        ("RobuQ PTQ", "W1.58A1"),
        ("low rank 8 + GMB", "W3A3"),
    ],
)
def test_a_row_of_each_kind_ends_in_a_graph_that_computes_it(tool, model, calibration, tmp_path, row, at):
    (chosen,) = tool.chosen(tool.ROWS, [row], "row")
    policy = chosen.make(tool.Case(model, column(tool, at), calibration, tmp_path, rank=2, seed=0))
    checkpoint = quantize(model, policy, calibration, tmp_path / "checkpoint", iterations=3)
    exported = export(checkpoint.folder, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    network, family = load_transformer(model)
    inputs = {name: value.numpy() for name, value in family.inputs(network.config, batch=3, seed=2).items()}
    # A tie of rounding may fall the other way: far below what quantization costs.
    assert tool.sqnr_db(call_numpy(load_quantized(checkpoint), inputs), session.run(None, inputs)[0]) > 40


@pytest.mark.parametrize(("column", "grid"), [("W1.58A1", "mid-rise"), ("W1.58A2", "mid-rise"), ("W3A3", "mid-tread")])
def test_robuq_has_its_grid(tool, model, calibration, tmp_path, column, grid):
    (chosen,) = tool.chosen(tool.COLUMNS, [column], "column")
    (row,) = tool.chosen(tool.ROWS, ["RobuQ PTQ"], "row")
    policy = row.make(tool.Case(model, chosen, calibration, tmp_path, rank=2, seed=0))
    layers = [policy.layers[name] for name in tool.block_linears(model)]
    assert {(layer.grid, layer.clip, layer.activation_bits[0]) for layer in layers} == {
        (grid, "gaussian", chosen.activation_bits)
    }


def test_a_table_is_measured_once_and_goes_on(tool, model, tmp_path, monkeypatch, capsys):
    more = ["--rows", "RTN", "branch v3", "--columns", "W4A4", "W1.58A2"]
    measured, measure, allowed = [], tool.measure, 3

    def counted(row, case, *rest):
        if len(measured) == allowed:
            raise KeyboardInterrupt
        measured.append((row.name, case.column.name, case.seed))
        return measure(row, case, *rest)

    monkeypatch.setattr(tool.module, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        tool.main(arguments(model, tmp_path, *more))
    assert not (tmp_path / tool.RESULT).exists()
    journal = tmp_path / tool.JOURNAL
    journal.write_text(journal.read_text() + '{"key": "cut sho')

    allowed = 8
    capsys.readouterr()
    assert tool.main(arguments(model, tmp_path, *more)) == 0
    assert len(measured) == len(set(measured)) == 8
    assert "5 cells to measure" in capsys.readouterr().out
    result = json.loads((tmp_path / tool.RESULT).read_text())
    assert {"date", "machine", "versions", "command", "model_sha256"} <= set(result)
    cells = {(cell["row"], cell["column"]): cell["seeds"] for cell in result["cells"]}
    assert len(cells) == 4 and all(set(seeds) == {"0", "1"} for seeds in cells.values())
    assert cells["RTN", "W4A4"]["0"]["sqnr_db"] > cells["RTN", "W1.58A2"]["0"]["sqnr_db"] + 5
    assert cells["RTN", "W1.58A2"]["0"]["activation_bits"] == 2
    assert cells["branch V3", "W1.58A2"]["0"]["weight_bits"] > cells["RTN", "W1.58A2"]["0"]["weight_bits"] > 1.6
    assert cells["RTN", "W4A4"]["0"]["sqnr_db"] != cells["RTN", "W4A4"]["1"]["sqnr_db"]

    picture = (tmp_path / "methods.svg").read_text()
    assert "branch V3" in picture and "W1.58A2" in picture
    document = (tmp_path / "methods.md").read_text()
    (tmp_path / "methods.md").unlink()
    assert tool.main(arguments(model, tmp_path, "--render")) == 0
    assert (tmp_path / "methods.md").read_text() == document and len(measured) == 8
    # What the journal holds so far becomes a table without measuring.
    journal.write_text("".join(journal.read_text().splitlines(True)[:3]))
    assert tool.main(arguments(model, tmp_path, "--collect", *more)) == 0 and len(measured) == 8
    assert 0 < len(json.loads((tmp_path / tool.RESULT).read_text())["cells"]) < 4


def test_the_document_shows_the_result(tool, tmp_path):
    keys = [key for key, *_ in (*tool.QUALITY, *tool.COST)]
    values = {"0": dict.fromkeys(keys, 1.0), "1": dict.fromkeys(keys, 1.5)}
    result = {
        "model": "some/model",
        "rendered_by": "cmd",
        "date": "2026-01-02T03:04:05",
        "machine": {"cpu": "C", "cores": 2},
        "versions": {"torch": "2"},
        "samples": 5,
        "steps": 4,
        "guidance": 1.5,
        "full_precision": {"0": {"accuracy": 1.0, "fd": 1.5}, "1": {"accuracy": 1.0, "fd": 2.5}},
        "rows": {"R": "what R is", "S": "what S is"},
        "cells": [{"row": "R", "column": "A", "seeds": values}, {"row": "S", "column": "B", "seeds": values}],
    }
    text = tool.render(result, picture="chart.svg")
    tool.chart.draw(result, tmp_path / "chart.svg")
    picture = (tmp_path / "chart.svg").read_text()
    assert all(f">{name}</text>" in picture for name in "ABRS")
    assert "methods on some/model" in text and "](chart.svg)" in text
    assert "| R | 1.2 ± 0.4 |  |" in text and "| S |  | 1.2 ± 0.4 |" in text
    assert "| R | what R is |" in text
    assert "class accuracy 1.000, FD 2.00 ± 0.71" in text
    assert text.count("\n## ") == len(tool.QUALITY) + len(tool.COST) + 1


def test_claims_are_judged_seed_by_seed(tool):
    def cells(*differences: float, fd: float = 0.0):
        base = {str(seed): {"sqnr_db": 10.0 * seed, "fd": 3.0} for seed in range(3)}
        better = {
            str(seed): {"sqnr_db": 10.0 * seed + difference, "fd": 3.0 + fd}
            for seed, difference in enumerate(differences)
        }
        return {("new", "A"): better, ("old", "A"): base}

    claim = tool.Claim("c", "new", "old", ("A",))
    assert tool.judge(claim, "A", cells(1.0, 1.2, 0.9)).word == "confirmed"
    assert tool.judge(claim, "A", cells(-1.0, -1.2, -0.9)).word == "refuted"
    assert tool.judge(claim, "A", cells(1.0, -1.2, 0.9)).word == "open"
    assert tool.judge(claim, "A", cells(1.0)).word == tool.judge(claim, "B", cells(1.0, 1.0)).word == "not measured"
    near = tool.Claim("n", "new", "old", ("A",), "fd", -0.3)
    assert tool.judge(near, "A", cells(0, 0, fd=0.2)).word == "confirmed"
    assert tool.judge(near, "A", cells(0, 0, fd=0.4)).word == "refuted"
    known = {row.name for row in tool.ROWS} | {tool.FULL}
    for claim in tool.CLAIMS:
        assert {claim.better, claim.worse} <= known
        for row in (row for row in tool.ROWS if row.name in (claim.better, claim.worse)):
            assert set(claim.columns) <= set(row.columns)


def test_means_and_deviations(tool):
    assert tool.summary([{"a": 1.0}, {"a": 3.0}]) == {"a": [2.0, pytest.approx(np.sqrt(2))]}
    assert tool.summary([{"a": 1.0}]) == {"a": [1.0, 0.0]}


def test_misuse_is_told(tool, model, tmp_path, capsys):
    assert tool.main(arguments(model, tmp_path, "--render")) == 2
    assert "no such file" in capsys.readouterr().err
    assert tool.main(arguments(model, tmp_path, "--rows", "nothing")) == 2
    assert "RTN + Hadamard" in capsys.readouterr().err
    with pytest.raises(Misuse, match="column"):
        tool.chosen(tool.COLUMNS, ["W5A5"], "column")
