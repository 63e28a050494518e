"""Block reconstruction: codes of a block's layers chosen together, by the error of what the block gives (BRECQ)."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import note
from dit2deploy.formats import pack
from dit2deploy.models.blocks import blocks_of
from dit2deploy.models.family import Family
from dit2deploy.nn.round_linear import RoundLinear, swap_for_rounding
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.quantizers.adaround import Rounding, learn
from dit2deploy.quantizers.fisher import PROBES
from dit2deploy.quantizers.objective import diagonal, low_rank, nystrom, squared
from dit2deploy.quantizers.walk import Calls
from dit2deploy.stages.quantize.block_calls import Recorded, draws, flat, output_power, outputs, record, responses
from dit2deploy.stages.quantize.conditions import ConditionPart, Conditions

BATCH = 8  # samples an iteration; PTQ4DiT takes 32, and far more iterations
WORK = 5 * 10**8  # weights times iterations of a whole model, where nobody says how many
FEWEST, MOST = 100, 20_000  # iterations; PTQ4DiT takes the most
SEEDS = 1 << 20  # units a seed
RANK = 4  # changes a sample that FIMA-Q's low-rank part is made of

Tensors = dict[str, np.ndarray]
Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Opened = Sequence[tuple[RoundLinear, Rounding]]


class Unit(NamedTuple):
    """A module whose layers are chosen together: a block, or a linear on its own."""

    name: str
    layers: tuple[str, ...]
    objective: str
    calls: str


def units_of(policy: Policy, names: Sequence[str], blocks: Sequence[str]) -> list[Unit]:
    """What is reconstructed, in order: linears calibrated on the conditions (TFMQ-DM: against their own outputs), then
    blocks and, each alone, linears outside of them, in the order of `names`.

    Raises Misuse for a block whose layers differ in their objective, and where inputs are quantized by two regions,
    whose steps are found later.
    """
    chosen = [name for name in names if policy.layers[name].rounding == "adaround" and policy.layers[name].is_quantized]
    if chosen and policy.has_regions:
        raise Misuse(
            "quantize: blocks with quantized attention or inputs of two regions cannot be reconstructed.",
            "Set the rounding of all layers to nearest or gptq, or the regions to token, in the policy.",
        )
    temporal = [Unit(name, (name,), "squared", "conditions") for name in chosen if _reads_conditions(policy, name)]
    held: dict[str, list[str]] = {}
    for name in chosen:
        if not _reads_conditions(policy, name):
            held.setdefault(next((block for block in blocks if name.startswith(f"{block}.")), name), []).append(name)
    found = []
    for unit, layers in held.items():
        objectives = {policy.layers[name].objective for name in layers}
        if len(objectives) > 1:
            raise Misuse(
                f"block {unit}: its layers differ in their objective ({', '.join(sorted(objectives))}).",
                "Give the layers of a block one objective in the policy.",
            )
        found.append(Unit(unit, tuple(layers), objectives.pop(), "trajectory"))
    return temporal + found


def _reads_conditions(policy: Policy, name: str) -> bool:
    return policy.layers[name].calls == "conditions"


def default_iterations(weights: int) -> int:
    """Iterations a unit for so many weights in all units."""
    return min(max(WORK // max(weights, 1), FEWEST), MOST)


def reconstruct(
    networks: tuple[torch.nn.Module, torch.nn.Module],
    family: Family,
    policy: Policy,
    calibration: CalibrationSet,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    *,
    done: Collection[str] = (),
    iterations: int | None = None,
    seed: int = 0,
) -> Iterator[tuple[dict[str, Tensors], float]]:
    """The tensors of the layers of each unit after AdaRound, and the seconds that it took; units whose layers are all
    in `done` are passed over.

    `networks` are two copies of the full-precision transformer, smoothing folded; the second one is taken over.
    `tensors` holds what the checkpoint would hold of each quantized layer; codes that are still to be chosen count for
    nothing in it. A unit's inputs are those that its quantized predecessors give, its outputs are compared with those
    of full precision (PTQ4DiT, Q-Diffusion and BRECQ, methods.md 6.7); activations are quantized meanwhile, per token
    as the ops do it, with straight-through gradients: the papers' static ranges, and the learning of them, have no part
    here. Codes that serve worse than round to nearest over the whole calibration set are not taken [our choice]. A
    unit's result depends on those before it, but not on where a run began.
    """
    exact, quantized = networks
    groups = TimestepGroups(policy.timestep_bounds, family.timestep_scale)
    blocks = list(blocks_of(quantized))
    layers = swap_for_rounding(quantized, policy, tensors, groups)
    units = units_of(policy, list(layers), blocks)
    if iterations is None:
        iterations = default_iterations(sum(layers[name].weight.numel() for unit in units for name in unit.layers))
    trajectory = exact, quantized, calibration
    conditions = trajectory
    if any(unit.calls == "conditions" for unit in units):
        part = ConditionPart(quantized)
        groups.attach(part)
        conditions = ConditionPart(exact), part, Conditions(calibration, family.classes_and_shape(exact.config)[0])
    missing = [index for index, unit in enumerate(units) if not set(unit.layers) <= set(done)]
    begun, finished = time.monotonic(), {}
    for count, index in enumerate(missing, start=1):
        unit, before = units[index], time.monotonic()
        reference, network, calls = conditions if unit.calls == "conditions" else trajectory
        records = record(network, reference, unit.name, calls, groups, {} if calls is not calibration else finished)
        fit = _Fit(network.get_submodule(unit.name), groups, records)
        generator = torch.Generator().manual_seed(seed * SEEDS + index)
        exact_weights = {name: reference.get_parameter(f"{name}.weight").detach() for name in unit.layers}
        opened = [(layers[name], layers[name].open(weight)) for name, weight in exact_weights.items()]
        terms = _terms(unit, fit, opened, reference, calls, generator)
        mixed = family.conditioning == "class"
        ratio = _learn(unit, fit, opened, terms, mixed=mixed, iterations=iterations, generator=generator)
        left = (time.monotonic() - begun) / count * (len(missing) - count) / 60
        note(f"quantize: {unit.name}, {iterations} iterations: error {ratio:.2f} of nearest, {left:.1f} min to go")
        if unit.name in blocks:
            with torch.no_grad():
                given = [(fit.given(one), one.given) for one in records]
            # What comes after reads the newest block of each list alone: the older ones may give anything of its form.
            stem = unit.name.rpartition(".")[0]
            earlier = blocks[: blocks.index(unit.name) + 1]
            finished |= {block: given for block in earlier if block.rpartition(".")[0] == stem}
        made = {
            name: {**tensors[name], "weight": pack(layer.codes.to(torch.int16).numpy(), layer.format)}
            for name, (layer, _) in zip(unit.layers, opened, strict=True)
        }
        yield made, time.monotonic() - before


class _Fit(NamedTuple):
    """A unit on its own, with what it was recorded to read and should give."""

    module: torch.nn.Module
    groups: TimestepGroups
    records: list[Recorded]

    def given(self, one: Recorded) -> Any:
        """What the module gives now."""
        self.groups.index = one.group
        try:
            return self.module(*one.arguments, **one.keywords)
        finally:
            self.groups.index = None

    def error(self, one: Recorded) -> torch.Tensor:
        """[B, n]: what the module gives now less what it should."""
        return flat(self.given(one)) - one.output

    def errors(self) -> torch.Tensor:
        """Those of all calls, without gradients."""
        with torch.no_grad():
            return torch.cat([self.error(one) for one in self.records])


def _sizes(terms: Sequence[Term], errors: torch.Tensor) -> list[float]:
    rows = torch.arange(len(errors))
    return [float(term(errors, rows).double().mean()) for term in terms]


def _terms(
    unit: Unit,
    fit: _Fit,
    opened: Opened,
    reference: torch.nn.Module,
    calls: Calls,
    generator: torch.Generator,
) -> list[Term]:
    """What counts of the unit's error; each term counts as much as the others (as in FIMA-Q's code)."""
    if unit.objective == "squared":
        return [squared]
    seed = int(torch.randint(1 << 30, (1,), generator=generator))
    power = output_power(reference, unit.name, calls, probes=PROBES, seed=seed)
    if unit.objective == "diagonal":
        return [partial(diagonal, power=power)]
    targets, changes = outputs(reference, calls), []
    for index in range(RANK):
        for layer, rounding in opened:
            layer.try_codes(layer.codes if index == 0 else rounding.drawn(generator))
        changes.append(fit.errors())
    caused = [responses(reference, unit.name, calls, change, targets) for change in changes]
    factors = nystrom(torch.stack(changes, 1), torch.stack(caused, 1))
    return [partial(low_rank, factors=factors), partial(diagonal, power=power)]


def _learn(
    unit: Unit,
    fit: _Fit,
    opened: Opened,
    terms: Sequence[Term],
    *,
    mixed: bool,
    iterations: int,
    generator: torch.Generator,
) -> float:
    """Settles the layers' codes; the error over that of round to nearest, 1 where that could not be bettered."""
    for layer, _ in opened:
        layer.try_codes(layer.codes)
    nearest = _sizes(terms, fit.errors())
    if min(nearest) <= 0:
        for layer, _ in opened:
            layer.close(layer.codes)
        return 1.0
    draw = draws(fit.records, mixed=mixed, batch=BATCH, generator=generator)

    def loss() -> torch.Tensor:
        one, rows = draw()
        error = fit.error(one)
        shares = [term(error, rows).mean() / size for term, size in zip(terms, nearest, strict=True)]
        return torch.stack(shares).mean()

    for layer, _ in opened:
        layer.try_codes(None)
    with torch.enable_grad():
        learn([rounding for _, rounding in opened], loss, iterations=iterations, told=f"reconstruct {unit.name}")
    for layer, rounding in opened:
        layer.try_codes(rounding.hard())
    sizes = _sizes(terms, fit.errors())
    ratio = sum(size / start for size, start in zip(sizes, nearest, strict=True)) / len(terms)
    for layer, rounding in opened:
        layer.close(rounding.hard() if ratio < 1 else layer.codes)
    return min(ratio, 1.0)
