"""Compares quantization methods on one model: fidelity, quality and size by method and bit-widths, over seeds."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.checkpoint import TENSORS
from dit2deploy.artefacts.policy import MonarchGrid, Policy
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_json, write_bytes
from dit2deploy.base.machine import versions
from dit2deploy.evaluate import Classifier, psnr_db, sqnr_db
from dit2deploy.evaluate.size import average_activation_bits, effective_weight_bits
from dit2deploy.evaluate.spectrum import high_frequency_error
from dit2deploy.models.load import linears_of, load_transformer, open_model
from dit2deploy.nn.convert import load_quantized, quantized_linears
from dit2deploy.nn.quant_linear import QuantLinear
from dit2deploy.ops.hadamard_quantize import SMALLEST, gaussian_step, hadamard, rows_of
from dit2deploy.ops.unpack import unpack
from dit2deploy.quantizers.branches import add_branches
from dit2deploy.quantizers.permutation import choose_rotation
from dit2deploy.quantizers.round_to_nearest import dequantize
from dit2deploy.sampling import Scheduler, initial_noise, trajectory
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.quantize.time_widths import search_time_widths
from dit2deploy.stages.quantize.tune import search_group_sizes, search_monarch, search_smoothing
from dit2deploy.stages.search import search
from dit2deploy.stages.search.uniform import default_rank

EXAMPLE = """example:
  python tools/methods_table.py --quick --rows RTN "RTN + Hadamard" --columns W4A4 --out build/methods
  python tools/methods_table.py                 # all of it: hours; goes on where a killed run stopped
  python tools/methods_table.py --render        # docs/methods.md from tools/results/methods_table.json

The journal holds every cell that is done; remove it when the code of a method has changed."""

RESULT, JOURNAL = "methods_table.json", "methods_table.jsonl"
FULL = "full precision"
KEPT = 10  # samples whose calls the quantized model is asked as full precision was
TIME_GROUPS = 3
EXTRA_BITS = 0.25  # a weight, for scales of groups: what `search_group_sizes` may spend
FLOAT_TO_QUANTIZED = 2.3  # times a call of full precision takes, both measures together; for the estimate only
QUANTIZING = 20.0  # seconds a cell; for the estimate only


class Column(NamedTuple):
    name: str
    recipe: str
    activation_bits: int
    weight_bits: int | None = None  # of codes in wider words


COLUMNS = (
    Column("W8A8", "w8a8", 8),
    Column("W6A6", "w8a8", 6, 6),  # int8 words that hold 6-bit codes
    Column("W4A4", "w4a4", 4),
    Column("W3A3", "w3a3", 3),
    Column("W1.58A4", "w1.58a4", 4),
    Column("W1.58A3", "w1.58a4", 3),
    Column("W1.58A2", "w1.58a4", 2),
    Column("W1.58A1", "w1.58a4", 1),
)


@dataclass(frozen=True)
class Case:
    """What a row makes its policy from."""

    model: Path
    column: Column
    calibration: CalibrationSet
    folder: Path  # for scratch files
    rank: int
    seed: int

    def uniform(self, **overrides: Any) -> Policy:
        """The column's recipe without what a method may add, and with what this one adds."""
        grid = "mid-tread" if self.column.activation_bits > 1 else "mid-rise"
        plain = {"hadamard": 1, "low_rank": 0, "rounding": "nearest", "clip": "absmax", "grid": grid}
        return search(
            self.model,
            self.folder / "policy.json",
            recipe=self.column.recipe,
            seed=self.seed,
            activation_bits=self.column.activation_bits,
            weight_bits=self.column.weight_bits,
            **{name: value for name, value in {**plain, **overrides}.items() if value is not None},
        )


class Row(NamedTuple):
    """`make(case)` gives the policy; an override of None leaves the choice to the recipe's own rule."""

    name: str
    what: str
    make: Callable[[Case], Policy]
    least_bits: int = 1  # of activations


def with_blocks(case: Case, policy: Policy, **changes: Any) -> Policy:
    """The policy with other options for its block linears."""
    role = open_model(case.model).family.role
    layers = {
        name: layer.model_copy(update=changes) if layer.is_quantized and role(name) == "block" else layer
        for name, layer in policy.layers.items()
    }
    return policy.model_copy(update={"layers": layers})


def uniform(case: Case, **overrides: Any) -> Policy:
    return case.uniform(**overrides)


def smooth(case: Case, alpha: float | None, **overrides: Any) -> Policy:
    """SmoothQuant where it can be folded (not before the second linear of the MLP); alpha None: searched."""
    policy = case.uniform(**overrides)
    if alpha is None:
        return search_smoothing(case.model, policy, case.calibration, seed=case.seed)
    layers = {
        name: layer.model_copy(update={"smoothing": alpha}) if name.endswith(SMOOTHED) else layer
        for name, layer in policy.layers.items()
    }
    return policy.model_copy(update={"layers": layers})


SMOOTHED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")


def smooth_branch(case: Case) -> Policy:
    return smooth(case, None, rounding="gptq", low_rank=case.rank, group_size=64)


def grouped(case: Case) -> Policy:
    return search_group_sizes(case.model, case.uniform(rounding="gptq"), case.calibration, seed=case.seed)


def tq_dit(case: Case, *, groups: int, attention: bool = True, regions: bool = True) -> Policy:
    """TQ-DiT at the column's bits; without `attention` its products stay in float, without `regions` GELU has tokens'
    steps."""
    bits = case.column.activation_bits
    recipe = "tq-dit" if bits == 8 else "tq-dit-w6a6"
    policy = search(case.model, case.folder / "policy.json", recipe=recipe, seed=case.seed, groups=groups)
    if not regions:
        policy = with_blocks(case, policy, regions="token")
    return policy if attention else policy.model_copy(update={"attentions": {}})


def evolved(case: Case) -> Policy:
    """Group sizes of weights below 8 bits by evolution, at the quarter bit that Q-DiT-like spends."""
    plain = case.uniform(rounding="gptq")
    if case.column.recipe == "w8a8":
        return plain
    found = search(
        case.model,
        case.folder / "q-dit.json",
        recipe="q-dit",
        calibration=case.calibration,
        base=case.column.recipe,
        activation_bits=case.column.activation_bits,
        budget=effective_weight_bits(plain, block_linears(case.model)) + EXTRA_BITS,
        seed=case.seed,
        trajectories=max(2, len(case.calibration.manifest.seeds) // 2),
        **{"hadamard": 1, "low_rank": 0, "rounding": "gptq", "clip": "absmax", "grid": "mid-tread"},
    )
    return found


def twin_log(case: Case) -> Policy:
    """Twin-Log weights, as int8 codes, where the column has 3 or 4 bits; zigzag where outliers are salient."""
    policy = choose_rotation(case.model, case.uniform(hadamard=None), case.calibration)
    bits = {"w4a4": 4, "w3a3": 3}.get(case.column.recipe)
    return with_blocks(case, policy, weight="int8", log_bits=bits) if bits else policy


def salient(case: Case) -> Policy:
    return with_blocks(case, case.uniform(low_rank=case.rank), branch_init="salient")


def lsg(case: Case) -> Policy:
    return smooth(case, 1.0, hadamard=None, low_rank=case.rank)


def timed(case: Case) -> Policy:
    policy = case.uniform(hadamard=None)
    average, groups = case.column.activation_bits, min(TIME_GROUPS, len(case.calibration))
    return search_time_widths(case.model, policy, case.calibration, average=average, groups=groups, seed=case.seed)


def branch(case: Case, **changes: Any) -> Policy:
    """Hadamard, gaussian clip and a low-rank branch: RobuQ's layer."""
    chosen = {"clip": "gaussian", "grid": None, "rounding": "gptq", **changes}
    of_recipe = {name: chosen.pop(name) for name in ("clip", "grid", "rounding")}
    return with_blocks(case, case.uniform(hadamard=None, low_rank=case.rank, **of_recipe), **chosen)


def robuq(case: Case) -> Policy:
    """What of RobuQ needs no training; its grid is mid-rise where that gains most (methods.md 3.4) [inferred]."""
    grid = "mid-rise" if case.column.activation_bits <= 2 else "mid-tread"
    return branch(case, rounding="nearest", branch_init="weight", grid=grid)


def reconstructed(case: Case, **changes: Any) -> Policy:
    """PTQ4DiT: salience balanced over the steps where it folds, then AdaRound, block by block."""
    return with_blocks(case, smooth(case, 0.5), rounding="adaround", smoothing_steps="correlation", **changes)


def temporal(case: Case) -> Policy:
    """TFMQ-DM: AdaRound by blocks, and on all timesteps and classes where a layer reads nothing else."""
    policy, role = with_blocks(case, case.uniform(), rounding="adaround"), open_model(case.model).family.role
    layers = {
        name: layer.model_copy(update={"rounding": "adaround", "calls": "conditions"})
        if layer.is_quantized and role(name) in ("modulation", "embedding")
        else layer
        for name, layer in policy.layers.items()
    }
    return policy.model_copy(update={"layers": layers})


BUDGET = 16  # parameters of the rows that compare branches, as the rank of a low-rank one (methods.md 4.3)


def sides(case: Case, low_rank: int, grid: MonarchGrid | None) -> Policy:
    """Hadamard, GPTQ and the recipe's clip with these branches, fitted before and after the codes are chosen."""
    policy = case.uniform(hadamard=None, clip=None, rounding="gptq", low_rank=low_rank)
    return with_blocks(case, policy, monarch=grid, branch_init="refit")


def searched_sides(case: Case) -> Policy:
    return search_monarch(case.model, sides(case, BUDGET, None), case.calibration, seed=case.seed)


ROWS = (
    Row("RTN", "round to nearest, absmax tokens", uniform),
    Row("RTN + Hadamard", "the same in rotated space", partial(uniform, hadamard=None)),
    Row("RTN + Hadamard + clip", "and RobuQ's gaussian clip", partial(uniform, hadamard=None, clip="gaussian")),
    Row("GPTQ", "GPTQ, absmax tokens", partial(uniform, rounding="gptq")),
    Row("Q-DiT-like", "GPTQ, group sizes searched (0.25 bits of scales a weight), symmetric", grouped),
    Row("Q-DiT-like, evolved", "the same bits, sizes by evolution on final latents", evolved, 2),
    Row("SmoothQuant", "alpha 0.5 where it folds, round to nearest", partial(smooth, alpha=0.5)),
    Row("ViDiT-Q-like", "smoothing searched, Hadamard, nearest", partial(smooth, alpha=None, hadamard=None)),
    Row("QuaRot-like", "Hadamard, GPTQ, absmax tokens", partial(uniform, hadamard=None, rounding="gptq")),
    Row("SVDQuant-like", "smoothing searched, branch, groups of 64, GPTQ", smooth_branch),
    Row(
        "LRQ-DiT-like",
        "Twin-Log weights at W4 and W3 (4- and 3-bit indices, stored as int8), Hadamard, zigzag after GELU, nearest",
        twin_log,
    ),
    Row("TR-DQ-like", "Hadamard, clip a layer, bits by 3 timestep groups at the column's mean, nearest", timed, 2),
    Row("MPQ-DMv2-like", "nearest, binary residual of the most salient input channels", salient),
    Row("LSGQuant-like", "smoothing by channel maxima (alpha 1), Hadamard, nearest, V3 branch", lsg),
    Row("RobuQ PTQ", "Hadamard, clip, V2 branch, nearest; a mid-rise grid up to 2 bits", robuq),
    Row("branch V1", "Hadamard, clip, GPTQ, branch of the residual", partial(branch, branch_init="residual")),
    Row("branch V2", "Hadamard, clip, GPTQ, branch of the weight", partial(branch, branch_init="weight")),
    Row("branch V3", "Hadamard, clip, GPTQ, branch alternating", branch),
    Row("branch V3, mid-tread", "the same without the mid-rise grid", partial(branch, grid="mid-tread"), 2),
    Row("branch V3, no clip", "the recipes' own at 4 bits: V3 with absmax tokens", partial(branch, clip="absmax")),
    Row("branch weighted", "V3 in the norm of the inputs", partial(branch, branch_init="weighted")),
    Row(
        "branch weighted, no clip",
        "the same with absmax tokens",
        partial(branch, branch_init="weighted", clip="absmax"),
    ),
    Row(
        "branch refit", "V2, refit in the norm of the inputs to what GPTQ leaves", partial(branch, branch_init="refit")
    ),
    Row("low rank 16", "Hadamard, GPTQ, the recipe's clip, refit branch", partial(sides, low_rank=BUDGET, grid=None)),
    *(
        Row(
            f"GMB {side} x {side}",
            f"the same with TreeQ's branch of as many parameters, blocks of rank {BUDGET // side}",
            partial(sides, low_rank=0, grid=MonarchGrid(side, side, BUDGET // side)),
        )
        for side in (2, 4, 8)
    ),
    Row("low rank 8 + GMB", "half of them in a 4 x 4 grid", partial(sides, low_rank=8, grid=MonarchGrid(4, 4, 2))),
    Row("GMB searched", "the split and grid of each layer by output error", searched_sides),
    Row("PTQ4DiT", "salience balanced over steps where it folds, AdaRound on blocks' outputs", reconstructed),
    Row("PTQ4DiT + FIMA-Q objective", "the same, Fisher-weighted", partial(reconstructed, objective="low_rank")),
    Row("TFMQ", "AdaRound; modulation and embedders on every timestep and class", temporal),
    Row(
        "TQ-DiT", "two regions after softmax and GELU, 10 time groups, integer attention", partial(tq_dit, groups=10), 6
    ),
    Row("TQ-DiT, 1 group", "the same steps for all timesteps", partial(tq_dit, groups=1), 6),
    Row("TQ-DiT, GELU by token", "two regions after softmax only", partial(tq_dit, groups=10, regions=False), 6),
    Row("TQ-DiT, float attention", "two regions after GELU only", partial(tq_dit, groups=10, attention=False), 6),
    Row("AdaTSQ GPTQ", "V3, Hessian weighted by Fisher scores", partial(branch, hessian="fisher")),
)

# What a cell holds, in the order of the document: key, title, digits.
QUALITY = (
    ("sqnr_db", "SQNR of the final image, dB", 1),
    ("step_sqnr_db", "SQNR of the model's output on the trajectory of full precision, mean over steps, dB", 1),
    ("psnr_db", "PSNR of the final image, dB", 1),
    ("accuracy", "class accuracy", 3),
    ("fd", "FD to real digits", 2),
    ("high_frequency_error", "error of the top quarter of spatial frequencies, share of their energy", 2),
)
COST = (
    ("weight_bits", "bits a weight, scales and branch included", 2),
    ("activation_bits", "bits an activation", 2),
    ("megabytes", "MB of the checkpoint", 2),
    ("seconds", "seconds to calibrate and quantize", 1),
)


class Drawn(NamedTuple):
    """Images float32 [N, C, H, W] and, for the first KEPT samples, each step's call and its output."""

    images: np.ndarray
    calls: list[tuple[tuple[np.ndarray, ...], np.ndarray]]


def draw(network: torch.nn.Module, scheduler: Scheduler, options: argparse.Namespace, seed: int) -> Drawn:
    """Images of seeds seed * samples .. , labels in turn."""
    config, calls = network.config, []
    labels = np.arange(options.samples) % config["num_embeds_ada_norm"]
    first = np.arange(min(KEPT, options.samples))

    def denoise(*values: np.ndarray) -> np.ndarray:
        output = ask(network, values)
        rows = np.concatenate([first + half for half in range(0, len(output), options.samples)])
        calls.append((tuple(value[rows] for value in values), output[rows]))
        return output

    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    noise = initial_noise(range(seed * options.samples, (seed + 1) * options.samples), shape)
    for step in trajectory(
        denoise,
        scheduler=scheduler,
        labels=labels,
        steps=options.steps,
        guidance=options.guidance,
        noise=noise,
        null_label=config["num_embeds_ada_norm"],
    ):
        last = step.after
    return Drawn(np.clip(last, -1, 1), calls)


def ask(network: torch.nn.Module, values: Sequence[np.ndarray]) -> np.ndarray:
    names = ("hidden_states", "timestep", "class_labels")
    with torch.inference_mode():
        inputs = {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
        return network(**inputs, return_dict=False)[0].numpy()


def quicken(network: torch.nn.Module) -> torch.nn.Module:
    """The same network with weights unpacked once, rotations as products, and one quantized input for q, k and v.

    For speed: it differs from the reference by the rounding of floats alone. Layers whose inputs are quantized to two
    regions, and attentions, stay as they are.
    """
    memory: dict[str, Any] = {}
    for layer in quantized_linears(network).values():
        if layer.policy.regions == "token":
            layer.forward = partial(_quick, layer, _dequantized(layer), _rotation(layer), memory)
    return network


def _dequantized(layer: QuantLinear) -> torch.Tensor:
    """float32 [N, K], of the rotated space."""
    return dequantize(unpack(layer.weight, layer.format, layer.in_features).float(), layer.weight_scale)


def _rotation(layer: QuantLinear) -> torch.Tensor:
    return hadamard(torch.eye(layer.policy.hadamard), block=layer.policy.hadamard)


def _quick(
    layer: QuantLinear, weight: torch.Tensor, rotation: torch.Tensor, memory: dict[str, Any], x: torch.Tensor
) -> torch.Tensor:
    policy, qmax = layer.policy, layer.groups.qmax(layer.qmax)
    how = policy.hadamard, policy.clip, policy.grid
    if memory.get("x") is not x or memory["how"] != how or not torch.equal(memory["qmax"], qmax):
        largest = rows_of(qmax, x)
        rotated = (x.reshape(-1, policy.hadamard) @ rotation).reshape(x.shape) if policy.hadamard > 1 else x
        if policy.clip == "gaussian":
            rms = torch.linalg.vector_norm(rotated, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            step = rms * gaussian_step(largest, policy.grid)
        else:
            step = rotated.abs().amax(-1, keepdim=True) / largest
        scaled = rotated / step.clamp_min(SMALLEST)
        codes = scaled.mul_(0.5).floor_().mul_(2).add_(1) if policy.grid == "mid-rise" else scaled.round_()
        memory.update(x=x, how=how, qmax=qmax, value=codes.clamp_(-largest, largest).mul_(step))
    y = torch.nn.functional.linear(memory["value"], weight, layer.bias)
    return add_branches(y, x, {leaf: getattr(layer, leaf).float() for leaf in policy.branch_leaves})


def measure(
    row: Row, case: Case, reference: Drawn, judge: Classifier, scheduler: Scheduler, options: argparse.Namespace
) -> dict[str, float]:
    """One cell at one seed: the values of QUALITY and COST."""
    begun = time.monotonic()
    policy = row.make(case)
    checkpoint = quantize(case.model, policy, case.calibration, case.folder / "checkpoint", seed=case.seed)
    seconds = time.monotonic() - begun
    network = quicken(load_quantized(checkpoint))
    found = draw(network, scheduler, options, case.seed)
    asked = [sqnr_db(exact, ask(network, values)) for values, exact in reference.calls]
    blocks = block_linears(case.model)
    return {
        "sqnr_db": sqnr_db(reference.images, found.images),
        "step_sqnr_db": float(np.mean(asked)),
        "psnr_db": psnr_db(reference.images, found.images, data_range=2),
        "high_frequency_error": high_frequency_error(reference.images, found.images),
        **judged(judge, found.images, network.config["num_embeds_ada_norm"]),
        "weight_bits": effective_weight_bits(policy, blocks),
        "activation_bits": average_activation_bits(policy, blocks, scheduler.timesteps(options.steps).tolist()),
        "megabytes": (checkpoint.folder / TENSORS).stat().st_size / 1e6,
        "seconds": seconds,
    }


def judged(judge: Classifier, images: np.ndarray, classes: int) -> dict[str, float]:
    return {
        "accuracy": judge.class_accuracy(images, np.arange(len(images)) % classes),
        "fd": judge.distance_to_real(images),
    }


def block_linears(model: Path) -> dict[str, tuple[int, int]]:
    """(N, K) of the block linears: they see every token, and hold what columns are named after."""
    network, family = load_transformer(model)
    return {name: shape for name, shape in linears_of(network).items() if family.role(name) == "block"}


class Journal:
    """Cells that are done, one JSON object a line; a line that a kill cut short does not count."""

    def __init__(self, path: Path, inputs: Any) -> None:
        self._path, self._inputs, self._cells = path, inputs, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            try:
                cell = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._cells[cell["key"]] = cell["values"]

    def _key(self, row: str, column: str, seed: int) -> str:
        return sha256_of_json([self._inputs, row, column, seed])

    def get(self, row: str, column: str, seed: int) -> dict[str, float] | None:
        return self._cells.get(self._key(row, column, seed))

    def add(self, row: str, column: str, seed: int, values: Mapping[str, float]) -> None:
        key = self._key(row, column, seed)
        self._cells[key] = dict(values)
        told = {"key": key, "row": row, "column": column, "seed": seed, "values": values}
        with self._path.open("a") as file:
            # A line of its own also where the one before was cut short.
            file.write(("" if self._is_whole() else "\n") + json.dumps(told) + "\n")

    def _is_whole(self) -> bool:
        content = self._path.read_bytes()
        return not content or content.endswith(b"\n")


def summary(cells: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Mean and standard deviation (of a sample, 0 for one) of each value over the seeds."""
    return {
        key: [
            float(np.mean([cell[key] for cell in cells])),
            float(np.std([cell[key] for cell in cells], ddof=1)) if len(cells) > 1 else 0.0,
        ]
        for key in cells[0]
    }


def render(result: Mapping[str, Any]) -> str:
    """docs/methods.md: a table for each value, methods down and bit-widths across."""
    columns = list(dict.fromkeys(cell["column"] for cell in result["cells"]))
    rows = list(dict.fromkeys(cell["row"] for cell in result["cells"]))
    by = {(cell["row"], cell["column"]): cell["values"] for cell in result["cells"]}
    full = result["full_precision"]
    lines = [
        "# Quantization methods on the demo model",
        "",
        f"Written by `{result['rendered_by']}` from a result file; do not edit.",
        f"Measured {result['date'][:10]} on {result['machine']['cpu']}, {result['machine']['cores']} cores, "
        f"torch {result['versions'].get('torch', '?')}: {result['samples']} samples, {result['steps']} DDIM steps, "
        f"guidance {result['guidance']:g}; mean ± standard deviation over {len(result['seeds'])} seed(s) of "
        "calibration, branch and noise.",
        "",
        "All rows quantize the same layers: the linears of the blocks as the column says, the modulation and embedding",
        "linears as the recipe of that column does (int8 or int4 weights, 8-bit inputs), the last one not at all.",
        "Products of attention stay in float but in TQ-DiT's rows; W6 is 6-bit codes in int8 words, and stores 8 bits.",
        "Weights are symmetric with scales of least squared error, tokens have",
        "one dynamic scale; methods are rebuilt from their papers in these formats, hence “like”. Every row compiles.",
        "Smoothing is folded into the layers before, so the second linear of the MLP, after GELU, goes without. Of",
        "AdaTSQ only the weights' part is here, of Q-DiT the groups of weights. Bits are those of the block linears.",
        "",
        f"Full precision: class accuracy {_cell(full['accuracy'], 3)}, FD {_cell(full['fd'], 2)}. FD is a Fréchet "
        "distance in the features of the demo's classifier, no FID: biased at so few samples, and comparable only "
        "within this page.",
        "",
        "| method | what it is |",
        "|---|---|",
        *(f"| {row} | {result['rows'][row]} |" for row in rows),
    ]
    for key, title, digits in (*QUALITY, *COST):
        lines += [
            "",
            f"## {title[0].upper()}{title[1:]}",
            "",
            _line(["", *columns]),
            _line(["---"] * (1 + len(columns))),
        ]
        for row in rows:
            values = (by.get((row, column)) for column in columns)
            lines.append(_line([row, *("" if value is None else _cell(value[key], digits) for value in values)]))
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Sequence[float], digits: int) -> str:
    mean, deviation = value
    text = f"{mean:.{digits}f}"
    return f"{text} ± {deviation:.{digits}f}" if deviation >= 0.5 * 10**-digits else text


def chosen(known: Sequence[Any], names: Sequence[str] | None, what: str) -> list[Any]:
    """The entries of these names, in the list's order; Misuse for a name that is not in it."""
    by_name = {entry.name.lower(): entry for entry in known}
    for name in names or ():
        if name.lower() not in by_name:
            raise Misuse(f"there is no {what} {name!r}.", f"Known: {', '.join(entry.name for entry in known)}.")
    wanted = {name.lower() for name in names or by_name}
    return [entry for entry in known if entry.name.lower() in wanted]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what the journal lacks, and writes the result file."""
    rows, columns = chosen(ROWS, options.rows, "row"), chosen(COLUMNS, options.columns, "column")
    source = open_model(options.model)
    network, _ = load_transformer(options.model)
    scheduler, judge = Scheduler.load(options.model), Classifier.load(options.classifier)
    settings = {name: getattr(options, name) for name in ("samples", "steps", "guidance", "calibration_samples")}
    journal = Journal(options.out / JOURNAL, [source.sha256, settings, versions("dit2deploy")])
    pairs = [(row, column) for column in columns for row in rows if column.activation_bits >= row.least_bits]
    missing = [
        (seed, row, column)
        for seed in range(options.seeds)
        for row, column in pairs
        if journal.get(row.name, column.name, seed) is None
    ]
    seeds = sorted({seed for seed, _, _ in missing} | {s for s in range(options.seeds) if not journal.get(FULL, "", s)})
    tell_estimate(network, options, cells=len(missing), seeds=len(seeds))
    rank, begun, done = default_rank(min(block_linears(options.model).values(), key=min)), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in seeds:
            calibration = calibrate(
                options.model,
                folder / f"calibration-{seed}",
                samples=options.calibration_samples,
                steps=options.steps,
                guidance=options.guidance,
                seed=seed,
            )
            reference = draw(network, scheduler, options, seed)
            if journal.get(FULL, "", seed) is None:
                journal.add(FULL, "", seed, judged(judge, reference.images, network.config["num_embeds_ada_norm"]))
            for _, row, column in (cell for cell in missing if cell[0] == seed):
                case = Case(options.model, column, calibration, folder, rank, seed)
                values = measure(row, case, reference, judge, scheduler, options)
                journal.add(row.name, column.name, seed, values)
                done += 1
                left = (time.monotonic() - begun) / done * (len(missing) - done) / 60
                print(
                    f"{row.name:<22} {column.name:<8} seed {seed}: {values['sqnr_db']:5.1f} dB, accuracy "
                    f"{values['accuracy']:.3f}, FD {values['fd']:.2f}; {left:.0f} min left",
                    flush=True,
                )
    cells = [
        {
            "row": row.name,
            "column": column.name,
            "values": summary([journal.get(row.name, column.name, seed) for seed in range(options.seeds)]),
        }
        for row, column in sorted(pairs, key=lambda pair: rows.index(pair[0]))
    ]
    return write_results(
        options.out / RESULT,
        "methods_table",
        {
            "model": str(options.model),
            "model_sha256": source.sha256,
            **settings,
            "seeds": list(range(options.seeds)),
            "rendered_by": "python tools/methods_table.py --render",
            "full_precision": summary([journal.get(FULL, "", seed) for seed in range(options.seeds)]),
            "rows": {row.name: row.what for row in rows},
            "cells": cells,
        },
    )


def tell_estimate(network: torch.nn.Module, options: argparse.Namespace, *, cells: int, seeds: int) -> None:
    config, batch = network.config, 2 * options.samples
    values = (
        np.zeros((batch, config["in_channels"], config["sample_size"], config["sample_size"]), np.float32),
        np.zeros(batch, np.int64),
        np.zeros(batch, np.int64),
    )
    ask(network, values)  # the first call is slower
    begun = time.monotonic()
    ask(network, values)
    step = (time.monotonic() - begun) * options.steps
    minutes = (cells * (step * FLOAT_TO_QUANTIZED + QUANTIZING) + 2 * seeds * step) / 60
    print(f"{cells} cells to measure, about {minutes:.0f} minutes", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("dit2deploy/demo"), help="class-conditional pipeline folder")
    parser.add_argument("--classifier", type=Path, default=Path("dit2deploy/demo/classifier.safetensors"))
    parser.add_argument("--rows", nargs="+", help="methods, by name (default: all)")
    parser.add_argument("--columns", nargs="+", help="bit-widths, by name (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default %(default)s)")
    parser.add_argument("--samples", type=int, default=50, help="images a cell and seed (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.5, help="default %(default)s")
    parser.add_argument("--calibration-samples", type=int, default=8, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="1 seed, 20 samples, 10 steps, 4 calibration samples")
    parser.add_argument("--out", type=Path, default=Path("tools/results"), help=f"folder of {RESULT} and its journal")
    parser.add_argument("--document", type=Path, default=Path("docs/methods.md"), help="default %(default)s")
    parser.add_argument("--render", action="store_true", help="only write the document from the result file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.samples, options.steps, options.calibration_samples = 1, 20, 10, 4
    torch.set_num_threads(options.threads)
    try:
        if not options.render:
            run(options)
        elif not (options.out / RESULT).exists():
            raise Misuse(f"{options.out / RESULT}: no such file.", "Measure first, without --render.")
        result = json.loads((options.out / RESULT).read_text())
        write_bytes(options.document, render(result).encode())
    except Misuse as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
