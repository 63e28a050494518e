"""Budgets in bytes and milliseconds: what they promise is what checkpoints hold and tables say."""

import json
import math

import numpy as np
import pytest

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.device_table import DeviceTable, Linear, LinearTime, as_run
from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.cli import main
from dit2deploy.models.dit import DIT
from dit2deploy.models.load import linears, open_model
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.profile.linears import _units
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.search import search
from dit2deploy.stages.search.budget import Budget, parse, rising
from dit2deploy.stages.search.front import Front

TINY = {
    "robuq-ampn": {"items": 4},
    "treeq-tss": {"items": 4, "survivors": 2},
    "adatsq": {"groups": 2, "beam": 2, "trajectories": 1},
}


@pytest.fixture(scope="module")
def model(tiny_dit_folder):
    return tiny_dit_folder


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory) -> CalibrationSet:
    return calibrate(model, tmp_path_factory.mktemp("calibration") / "set", samples=2, steps=4)


def time_of(linear: Linear) -> float:
    """A device on which bits cost: as many milliseconds as millions of bit operations, and a little for each layer."""
    weight = {"ternary": 2, "int3": 3, "int4": 4, "int8": 8, "float": 32}[linear.weight]
    return 0.01 + linear.n * linear.k * linear.rows * weight * linear.bits / 1e7


@pytest.fixture(scope="module")
def device(model, tmp_path_factory) -> DeviceTable:
    """Times of all that a search with base w1.58a4 and few widths can ask for."""
    policy = search(model, tmp_path_factory.mktemp("base") / "policy.json", recipe="w1.58a4")
    shapes, units = _units(open_model(model), None)
    found = set()
    for unit in units:
        for weight in ("ternary", "int3", "int4", "int8", None):
            for bits in (2, 3, 4, 6, 8):
                changes = {"weight": weight, "activation_bits": (bits,)} if weight else {}
                layers = {name: policy.layers[name].model_copy(update=changes) for name in unit.layers}
                found |= set(as_run(layers, shapes, unit.rows, group=0))
    table = DeviceTable(device="toy", target="ort-cpu", threads=1, batch=1, instructions="", library_sha256="")
    return table.extended(
        LinearTime(linear=one, ms=time_of(one), least_ms=0, rounds=1) for one in sorted(found, key=str)
    )


def milliseconds(policy: Policy, model, lengths=(1.0,)) -> float:
    """By another way than the search: layer by layer, q, k and v together by name."""
    total = 0.0
    for name, (n, k) in linears(open_model(model)).items():
        layer, tokens = policy.layers[name], 16 if DIT.role(name) == "block" or name == "proj_out_2" else 1
        if name.endswith((".to_k", ".to_v")):
            continue
        joined = 3 if name.endswith(".to_q") else 1
        weight = {"ternary": 2, "int3": 3, "int4": 4, "int8": 8, "float": 32}[layer.weight]
        wider = layer.grid == "mid-rise"  # odd codes take a bit more in the GEMM
        for length, bits in zip(lengths, layer.activation_bits or (32,) * len(lengths), strict=True):
            bits += wider
            total += length * (0.01 + joined * n * k * tokens * weight * bits / 1e7)
    return total


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        (3, Budget(3.0, "bits")),
        ("2.5 bits", Budget(2.5, "bits")),
        ("1.8MB", Budget(1.8e6, "bytes")),
        ("900 kB", Budget(900e3, "bytes")),
        ("3.2ms", Budget(3.2, "milliseconds")),
    ],
)
def test_budgets_are_read_with_their_unit(text, budget):
    assert parse(text) == budget and parse(str(budget)) == budget and parse(budget.told) == budget


@pytest.mark.parametrize("text", ["", "fast", "3 s", "0ms", "-1", "1.8.2MB"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(Misuse, match="is none"):
        parse(text)


@pytest.mark.parametrize("recipe", ["robuq-ampn", "treeq-tss"])
def test_bytes_are_those_of_the_checkpoint(recipe, model, calibration, tmp_path):
    out = tmp_path / "policy.json"
    options = {"calibration": calibration, "allocate": "weights", "rounding": "nearest", "low_rank": 2, **TINY[recipe]}
    policy = search(model, out, recipe=recipe, budget="0.115MB", **options)
    made = quantize(model, policy, calibration, tmp_path / "checkpoint")
    held = sum(made.tensors.read(name).nbytes for name in made.tensors)
    assert held == policy.options["bytes"] <= 115_000
    assert policy.options["budget"] == "0.115 MB"
    front = json.loads((tmp_path / "policy.front.json").read_text())
    assert front["unit"] == "bytes" and front["points"][front["chosen"]]["cost"] == held
    assert len({layer.weight for layer in policy.layers.values()}) > 2
    with pytest.raises(Misuse, match="the least that this search can reach is") as refused:
        search(model, tmp_path / "b.json", recipe=recipe, budget="50kB", **options)
    least = str(refused.value).split("can reach is ")[1].split(" MB")[0]
    smallest = search(model, tmp_path / "c.json", recipe=recipe, budget=f"{least}MB", **options)
    assert {smallest.layers[name].weight for name in smallest.layers if ".ff." in name} == {"ternary"}


def test_group_sizes_within_bytes(model, calibration, tmp_path):
    options = {"calibration": calibration, "rounding": "nearest", "population": 4, "generations": 1, "trajectories": 1}
    sizes = {None: search(model, tmp_path / "plain.json", recipe="w4a8", rounding="nearest")}
    sizes[16] = search(model, tmp_path / "groups.json", recipe="w4a8", rounding="nearest", group_size=16)
    held = {}
    for size, policy in sizes.items():
        made = quantize(model, policy, calibration, tmp_path / f"checkpoint{size}")
        held[size] = sum(made.tensors.read(name).nbytes for name in made.tensors)
    budget = (held[None] + held[16]) // 2
    policy = search(model, tmp_path / "policy.json", recipe="q-dit", budget=f"{budget}B", **options)
    assert held[None] <= policy.options["bytes"] <= budget
    with pytest.raises(Misuse, match="the least that this search can reach"):
        search(model, tmp_path / "b.json", recipe="q-dit", budget=f"{held[None] - 1}B", **options)


def test_layers_that_read_one_input_run_as_one_but_with_monarch_branches():
    sizes = {"q": (48, 32), "k": (16, 32)}
    plain = LayerPolicy(weight="int4", activation_bits=(3, 5), low_rank=2, hadamard=8)
    (joined,) = as_run(dict.fromkeys(sizes, plain), sizes, 7, group=1)
    assert (joined.n, joined.k, joined.rows, joined.low_rank, joined.bits, joined.hadamard) == (64, 32, 7, 4, 5, 8)
    assert len(as_run({"q": plain, "k": plain.model_copy(update={"weight": "int3"})}, sizes, 7, group=0)) == 2
    monarch = plain.model_copy(update={"low_rank": 0, "monarch": (2, 2, 1)})
    assert [one.n for one in as_run(dict.fromkeys(sizes, monarch), sizes, 7, group=0)] == [48, 16]
    rise = LayerPolicy(weight="int4", activation_bits=(2,), grid="mid-rise")
    assert as_run({"q": rise}, sizes, 1, group=0)[0].bits == 3  # odd codes -3 .. 3 of 2 bits fill an int3


@pytest.mark.parametrize("recipe", TINY)
@pytest.mark.parametrize("allocate", ["activations", "weights"])
def test_milliseconds_are_those_of_the_table(recipe, allocate, model, calibration, device, tmp_path):
    if recipe == "adatsq" and allocate == "weights":
        pytest.skip("adatsq chooses activation bits only")
    options = {"bits": (2, 3, 4, 6, 8), "calibration": calibration, "device": device, "seed": 1, **TINY[recipe]}
    if recipe != "adatsq":
        options["allocate"] = allocate
    budget = 1.4 if allocate == "activations" else 1.7
    policy = search(model, tmp_path / "policy.json", recipe=recipe, budget=f"{budget}ms", **options)
    lengths = (0.5, 0.5) if recipe == "adatsq" else (1.0,)
    spent = milliseconds(policy, model, lengths)
    assert spent == pytest.approx(policy.options["milliseconds"], abs=1e-5) and spent <= budget + 1e-9
    assert policy.options["device"] == "toy" and policy.options["device_sha256"] == device.sha256
    front = schema.load(Front, tmp_path / "policy.front.json", cure="")
    assert (front.unit, front.device) == ("milliseconds", "toy")
    assert np.all(np.diff([point.cost for point in front.points]) > 0)
    for point in front.points:
        assert milliseconds(point.policy, model, lengths) == pytest.approx(point.cost, abs=1e-5)
    again = search(model, tmp_path / "again.json", recipe=recipe, budget=f"{budget}ms", **options)
    assert again == policy
    for suffix in (".json", ".front.json"):
        first, second = (tmp_path / f"{name}{suffix}" for name in ("policy", "again"))
        assert first.read_bytes() == second.read_bytes()
    with pytest.raises(Misuse, match=r"the least that this search can reach is 1\.\d+ ms"):
        search(model, tmp_path / "b.json", recipe=recipe, budget="0.1ms", **options)


def test_what_the_table_lacks_is_named_with_the_cure(model, calibration, device, tmp_path):
    options = {"recipe": "robuq-ampn", "calibration": calibration, "budget": "1.4ms", "items": 4}
    with pytest.raises(Misuse, match=r"no time of a linear of 144 x 48, 16 tokens, ternary, 5-bit") as refused:
        search(model, tmp_path / "p.json", device=device, bits=(2, 5), **options)
    assert "measure-ops" in refused.value.cure
    with pytest.raises(Misuse, match="rank 9"):
        search(model, tmp_path / "p.json", device=device, bits=(2, 4), low_rank=3, **options)
    with pytest.raises(Misuse, match="on which device"):
        search(model, tmp_path / "p.json", **options)
    with pytest.raises(Misuse, match="says nothing of it"):
        search(model, tmp_path / "p.json", device=device, **{**options, "budget": 3})
    with pytest.raises(Misuse, match="change no byte"):
        search(model, tmp_path / "p.json", **{**options, "budget": "1MB"})
    assert not list(tmp_path.iterdir())


def test_noise_makes_no_width_look_cheaper():
    assert rising([0.4, 0.39, 0.41, 0.405]) == [0.4, 0.4, 0.41, 0.41]


def test_a_front_of_version_1_is_read():
    policy = {
        "model": "M",
        "method": "robuq-ampn",
        "layers": {"a": LayerPolicy(weight="float").model_dump(mode="json")},
    }
    told = {
        "schema_version": 1,
        "kind": "search_front",
        "recipe": "robuq-ampn",
        "allocate": "activations",
        "weighting": "macs",
        "budget": 3.0,
        "chosen": 0,
        "points": [{"average_bits": 2.5, "error": 0.1, "policy": policy}],
        "uniform": [[2.0, 0.3]],
    }
    front = Front.model_validate(told)
    assert (front.schema_version, front.unit, front.points[0].cost) == (2, "bits", 2.5)


def test_the_command_takes_a_table(model, calibration, device, tmp_path, capsys):
    device.save(tmp_path / "device.json")
    words = ["--recipe", "robuq-ampn", "--bits", "2,4", "--items", "4", "--budget", "1.4ms"]
    words += ["--device", str(tmp_path / "device.json"), "--calibration", str(calibration.folder)]
    main(["search", str(model), "-o", str(tmp_path / "policy.json"), "--json", *words])
    told = json.loads(capsys.readouterr().out)
    assert 0 < told["milliseconds"] <= 1.4 and math.isfinite(told["milliseconds"])
