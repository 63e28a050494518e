"""Mixed-precision recipes on the tiny model: budgets hold, killed searches go on, bad input is refused by name."""

import json

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.cli import main
from dit2deploy.formats import by_name, unpack
from dit2deploy.models.flux import FLUX
from dit2deploy.models.load import linears, load_transformer, open_model
from dit2deploy.nn.simulate import Simulation
from dit2deploy.nn.units import units_of
from dit2deploy.ops.hadamard_quantize import hadamard
from dit2deploy.quantizers.linear import quantize_linear
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.search import mixed, search, take_point
from dit2deploy.stages.search.journal import Journal
from dit2deploy.stages.search.measure import Measure, items_of
from dit2deploy.stages.search.trajectories import sensitivities
from dit2deploy.stages.search.tss import OPEN
from dit2deploy.stages.search.units import Choice, at_widths
from tests import packing

BLOCKS = "transformer_blocks"
TINY = {
    "robuq-ampn": {"items": 8},
    "treeq-tss": {"bits": (2, 3, 4), "items": 20, "survivors": 3, "refine": True},
    "adatsq": {"bits": (2, 3, 4, 6), "groups": 2, "beam": 3, "trajectories": 2},
}
WEIGHTS = {
    "hawq": {"items": 6},
    "q-dit": {"budget": 4.9, "trajectories": 2, "population": 6, "generations": 2},
}


@pytest.fixture(scope="module")
def model(tiny_dit_folder):
    return tiny_dit_folder


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory) -> CalibrationSet:
    return calibrate(model, tmp_path_factory.mktemp("calibration") / "set", samples=3, steps=4)


@pytest.fixture(scope="module")
def shapes(model) -> dict[str, tuple[int, int]]:
    return linears(open_model(model))


def average(policy: Policy, shapes, cost) -> float:
    """Of `cost(layer)` over the block linears by their sizes: the tiny model's block linears all see 16 tokens."""
    sizes = {name: n * k for name, (n, k) in shapes.items() if name.startswith(BLOCKS) and ".norm1." not in name}
    return sum(size * cost(policy.layers[name]) for name, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize("recipe", TINY)
def test_a_search_meets_its_budget_and_leaves_its_front(recipe, model, calibration, shapes, tmp_path):
    out = tmp_path / "policy.json"
    policy = search(model, out, recipe=recipe, calibration=calibration, budget=3.0, low_rank=2, **TINY[recipe])
    assert Policy.load(out) == policy
    policy.check_covers("DiTTransformer2DModel", shapes)
    assert policy.method == recipe
    lengths = np.diff([0, *policy.timestep_bounds]) if recipe == "adatsq" else [1]
    assert len(policy.timestep_bounds) == len(lengths) == (2 if recipe == "adatsq" else 1)
    mean = average(policy, shapes, lambda layer: np.mean(layer.activation_bits))
    assert mean <= 3.0 + 1e-9
    assert policy.options["average_bits"] == pytest.approx(mean, abs=1e-5)
    block = policy.layers[f"{BLOCKS}.0.attn1.to_q"]
    assert (block.weight, block.low_rank, block.rounding) == ("ternary", 2, "gptq")
    assert policy.layers[f"{BLOCKS}.0.norm1.linear"].weight == "int4"
    for side in ("k", "v"):
        assert policy.layers[f"{BLOCKS}.0.attn1.to_{side}"].activation_bits == block.activation_bits

    front = json.loads((tmp_path / "policy.front.json").read_text())
    points = front["points"]
    assert points[front["chosen"]]["policy"] == json.loads(out.read_text())
    assert np.all(np.diff([point["cost"] for point in points]) > 0)
    assert np.all(np.diff([point["error"] for point in points]) < 0)
    alike = [error for bits, error in front["uniform"] if bits <= 3.0]
    assert points[front["chosen"]]["error"] <= min(alike)
    assert (tmp_path / "policy.front.png").read_bytes()[:4] == b"\x89PNG"
    assert take_point(model, out, 0) == Policy.load(out)
    assert Policy.load(out).options["average_bits"] == points[0]["cost"]


@pytest.mark.parametrize("recipe", [*TINY, *WEIGHTS])
def test_a_killed_search_goes_on_to_the_same_bytes(recipe, model, calibration, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    options = {"recipe": recipe, "calibration": calibration, "seed": 3, **(TINY | WEIGHTS)[recipe]}
    search(model, whole, **options)
    value, left = Journal.value, 12

    def failing(self, what, measure):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return value(self, what, measure)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "value", failing)
        with pytest.raises(KeyboardInterrupt):
            search(model, killed, **options)
    assert not killed.exists()
    journal = killed.with_suffix(".journal.jsonl")
    with open(journal, "a") as file:
        file.write('\n{"key": "cut sho')
    search(model, killed, **options)
    assert killed.read_bytes() == whole.read_bytes()
    assert killed.with_suffix(".front.json").read_bytes() == whole.with_suffix(".front.json").read_bytes()
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines() if line.endswith("}")]
    assert len(keys) == len(set(keys))
    before = journal.read_bytes()
    search(model, killed, **options)
    assert journal.read_bytes() == before  # nothing was measured again


def test_the_command_searches_and_takes_points(model, calibration, tmp_path, capsys):
    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["search", str(model), "-o", str(tmp_path / "policy.json"), *map(str, arguments)])
            raise SystemExit(0)
        printed = capsys.readouterr()
        assert not stopped.value.code, printed.err
        return printed.out

    options = ("--recipe", "robuq-ampn", "--budget", 2.5, "--bits", "2,3", "--items", 4)
    assert "bits on average" in run(*options, "--calibration", calibration.folder)
    told = json.loads(run("--point", 0, "--json"))
    assert told["average_bits"] == 2.0 and told["method"] == "robuq-ampn"
    with pytest.raises(AssertionError, match="no list of bits"):
        run("--bits", "2;3")


def test_each_layer_has_the_grid_of_its_bits(model, calibration, tmp_path):
    options = {"recipe": "robuq-ampn", "calibration": calibration, "bits": (1, 3, 5), "budget": 2, "items": 4}
    search(model, tmp_path / "policy.json", **options)
    points = json.loads((tmp_path / "policy.front.json").read_text())["points"]
    layers = [layer for point in points for layer in point["policy"]["layers"].values() if layer.get("low_rank")]
    found = {(layer["activation_bits"][0], layer.get("grid", "mid-tread")) for layer in layers}
    assert found == {(1, "mid-rise"), (3, "mid-rise"), (5, "mid-tread")}


def test_weight_formats_are_chosen_by_stored_bits(model, calibration, shapes, tmp_path):
    out = tmp_path / "policy.json"
    policy = search(model, out, recipe="robuq-ampn", calibration=calibration, allocate="weights", budget=2.5, items=6)
    stored = {"ternary": 1.6, "int3": 3.0, "int4": 4.0, "int8": 8.0}
    assert average(policy, shapes, lambda layer: stored[layer.weight]) <= 2.5 + 1e-9
    assert len({policy.layers[name].weight for name in shapes}) > 2
    assert policy.layers[f"{BLOCKS}.0.ff.net.2"].activation_bits == (4,)


def test_units_share_their_input_and_count_tokens(model, calibration, shapes):
    module, family = load_transformer(model)
    network = Simulation(module, bounds=(1000,), timestep_scale=1.0)
    parts = items_of(calibration, family, module.config, 20, seed=0)
    assert [len(part["timestep"]) for part in parts] == [5, 15]
    assert all(len(set(part["timestep"].tolist())) == 4 for part in parts)
    assert len(items_of(calibration, family, module.config, 8, seed=0)) == 1
    names = [name for name in shapes if family.role(name) == "block"]
    units = units_of(network.module, names, parts[0])
    assert [unit.layers[0].removeprefix(f"{BLOCKS}.") for unit in units[:4]] == [
        "0.attn1.to_q",
        "0.attn1.to_out.0",
        "0.ff.net.0.proj",
        "0.ff.net.2",
    ]
    assert [unit.block for unit in units] == [0] * 4 + [1] * 4
    assert len(units[0].layers) == 3 and units[0].macs == 16 * units[0].parameters == 16 * 3 * 48 * 48
    assert [units[0].weight(by) for by in ("macs", "parameters", "layers")] == [16 * 6912, 6912, 3]


def test_replayed_blocks_do_not_change_an_error(model, calibration, tmp_path):
    """OPEN units before the first other one are replayed; with the same choices spelled out, all is computed."""
    module, family = load_transformer(model)
    network = Simulation(module, bounds=(1000,), timestep_scale=1.0)
    parts = items_of(calibration, family, module.config, 20, seed=0)
    policy = search(model, tmp_path / "policy.json", recipe="w4a4")
    names = [name for name in policy.layers if family.role(name) == "block"]
    units = units_of(network.module, names, parts[0])
    choices = [
        [
            Choice(bits, {name: at_widths(policy.layers[name], [bits], {"clip": "gaussian"}) for name in unit.layers})
            for bits in (3, 5)
        ]
        for unit in units
    ]
    journal = Journal(tmp_path / "journal.jsonl", stamp=0)
    environment = [row[0] for row in choices]
    measure = Measure(network, Choice(8, policy.layers), units, choices, environment, parts, journal)
    late = (OPEN,) * 7
    replayed = [measure.errors((*late, 1), part) for part in (0, 1)]
    assert journal.measured == 2
    computed = Measure(
        network, Choice(8, policy.layers), units, choices, environment, parts, Journal(tmp_path / "other", stamp=0)
    )
    for part in (0, 1):
        np.testing.assert_array_equal(replayed[part], computed.errors((0,) * 7 + (1,), part))
    assert measure.mean((0,) * 8) == pytest.approx(computed.mean((OPEN,) * 8))
    assert measure.mean((1,) * 8) < measure.mean((0,) * 8)


def test_a_family_without_trajectories(tmp_path):
    """Its calibration set holds random calls, in which positions have no batch axis: AMPN works, AdaTSQ cannot."""
    packing.tiny_module(FLUX).save_pretrained(tmp_path / "flux")
    held = calibrate(tmp_path / "flux", tmp_path / "set", samples=2, steps=4)
    out = tmp_path / "policy.json"
    policy = search(tmp_path / "flux", out, recipe="robuq-ampn", calibration=held, bits=(3, 5), budget=4, items=4)
    assert {layer.activation_bits for layer in policy.layers.values()} >= {(3,), (5,)}
    for recipe in ("adatsq", "q-dit"):
        with pytest.raises(Misuse, match="no trajectories"):
            search(tmp_path / "flux", out, recipe=recipe, calibration=held)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"calibration": None}, "no set is given"),
        ({"recipe": "treeq-tss", "budget": 1.5}, "no average of 2, 3, 4"),
        ({"budget": 5}, "no average of 1, 2, 3, 4 bits"),
        ({"grid": "mid-tread"}, "1 bit takes the mid-rise grid"),
        ({"recipe": "adatsq", "groups": 2, "bits": (1, 4, 8)}, "at most 7 bits"),
        ({"budget": 9.0}, "no average of"),
        ({"allocate": "weights", "budget": 1.0}, "no average of 1.6"),
        ({"allocate": "both"}, "allocate 'both'"),
        ({"weighting": "bytes"}, "weighting 'bytes'"),
        ({"base": "treeq-tss"}, "no uniform recipe"),
        ({"bits": (4, 3)}, "no rising widths"),
        ({"beam": 4}, "no option 'beam'"),
        ({"activation_bits": 4}, "no option 'activation_bits'"),
        ({"low_rank": 49}, "rank 49"),
        ({"recipe": "adatsq", "groups": 5}, "4 steps, too few for 5"),
        ({"recipe": "treeq-tss", "lam": 2.0}, "lam 2.0"),
    ],
)
def test_what_does_not_fit_is_refused(model, calibration, tmp_path, options, fault):
    given = {"recipe": "robuq-ampn", "calibration": calibration, **options}
    with pytest.raises(Misuse, match=fault) as refused:
        search(model, tmp_path / "policy.json", **given)
    assert refused.value.cure
    assert not list(tmp_path.iterdir())


def test_a_point_that_is_not_there(model, tmp_path):
    with pytest.raises(Misuse, match="no such file"):
        take_point(model, tmp_path / "policy.json", 0)


def test_every_recipe_names_options_that_exist():
    known = set(mixed.Options.__dataclass_fields__)
    assert all(set(recipe.options) <= known for recipe in mixed.RECIPES)


def test_group_sizes_keep_to_their_bits(model, calibration, shapes, tmp_path):
    """Q-DiT: bits are recounted here from the policy: 4 a code (48 and 192 columns fill their words), 32 a scale."""
    out = tmp_path / "policy.json"
    options = {"calibration": calibration, **WEIGHTS["q-dit"]}
    policy = search(model, out, recipe="q-dit", **options)
    inner = {name: shape for name, shape in shapes.items() if name.startswith(BLOCKS) and ".norm1." not in name}
    sizes = {name: policy.layers[name].group_size or shapes[name][1] for name in inner}
    scales = sum(32 * n * (k // sizes[name]) for name, (n, k) in inner.items())
    bits = 4 + scales / sum(n * k for n, k in inner.values())
    assert bits <= 4.9 + 1e-9
    assert policy.options["average_bits"] == pytest.approx(bits, abs=1e-5)
    assert len(set(sizes.values())) > 1
    for block in (0, 1):
        assert len({sizes[f"{BLOCKS}.{block}.attn1.to_{letter}"] for letter in "qkv"}) == 1
    assert {policy.layers[name].weight for name in inner} == {"int4"}
    assert {policy.layers[name].rounding for name in inner} == {"gptq"}
    front = json.loads((tmp_path / "policy.front.json").read_text())
    assert front["allocate"] == "groups"
    alike = [error for cost, error in front["uniform"] if cost <= 4.9]
    assert front["points"][front["chosen"]]["error"] <= min(alike)
    assert front["uniform"][0][0] == pytest.approx(min(cost for cost, _ in front["uniform"]))
    for given, fault in (({"budget": 4.1}, "take 4.* bits"), ({"group_size": 16}, "no option 'group_size'")):
        with pytest.raises(Misuse, match=fault):
            search(model, tmp_path / "other.json", recipe="q-dit", **{**options, **given})


def test_formats_by_trace_are_the_best_sum_that_the_budget_allows(model, calibration, shapes, tmp_path):
    """Weight errors from packed tensors, all 4^8 allotments tried; the traces are those of `sensitivities`."""
    policy = search(model, tmp_path / "p.json", recipe="hawq", calibration=calibration, budget=2.5, low_rank=2, items=8)
    stored = {"ternary": 1.6, "int3": 3.0, "int4": 4.0, "int8": 8.0}
    assert average(policy, shapes, lambda layer: stored[layer.weight]) <= 2.5 + 1e-9

    module, family = load_transformer(model)
    base = search(model, tmp_path / "base.json", recipe="w1.58a4", low_rank=2)
    network = Simulation(module, bounds=(1000,), timestep_scale=1.0)
    part = items_of(calibration, family, module.config, 8, seed=0)[0]
    units = units_of(module, [name for name in shapes if family.role(name) == "block"], part)
    network.choose_float()
    sums = np.zeros(1)
    bits = np.zeros(1)
    for unit, trace in zip(units, sensitivities(network, units, part, seed=0, probes=4), strict=True):
        errors = [sum(weight_error(network, base, name, weight) for name in unit.layers) for weight in stored]
        sums = (sums[:, None] + np.array(errors) * trace / unit.parameters).reshape(-1)
        bits = (bits[:, None] + unit.parameters * np.array(list(stored.values()))).reshape(-1)
    best = np.where(bits / sum(unit.parameters for unit in units) <= 2.5 + 1e-9, sums, np.inf).argmin()
    formats = np.unravel_index(best, (4,) * len(units))
    wanted = {name: list(stored)[index] for unit, index in zip(units, formats, strict=True) for name in unit.layers}
    front = json.loads((tmp_path / "p.front.json").read_text())
    found = [{name: point["policy"]["layers"][name]["weight"] for name in wanted} for point in front["points"]]
    assert wanted in found


def weight_error(network: Simulation, base: Policy, name: str, weight: str) -> float:
    layer = base.layers[name].model_copy(update={"weight": weight}).without_moments
    matrix = network.layers[name].weight.detach()
    tensors = quantize_linear(matrix.numpy(), None, layer)
    codes = unpack(tensors["weight"], by_name(weight), matrix.shape[1]) * tensors["weight_scale"]
    back = hadamard(torch.from_numpy(codes).float(), block=layer.hadamard).numpy()
    branch = tensors["up"].astype(np.float32) @ tensors["down"].astype(np.float32)
    return float(((matrix.numpy() - back - branch) ** 2).sum())
