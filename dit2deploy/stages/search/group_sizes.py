"""Q-DiT on a model: a group size for each unit of layers, bred by the error of final latents (methods.md 6.5)."""

from collections.abc import Callable, Mapping, Sequence

import torch

from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import note, track
from dit2deploy.evaluate.size import layer_bits
from dit2deploy.nn.units import Unit
from dit2deploy.stages.search import evolution
from dit2deploy.stages.search.budget import check_is_possible
from dit2deploy.stages.search.evolution import Genes
from dit2deploy.stages.search.pareto import TOLERANCE, Point
from dit2deploy.stages.search.task import Found, Task
from dit2deploy.stages.search.units import Choice, prepare
from dit2deploy.stages.search.walk import Walk, check_walks, latent_error, samples_of

SIZES = (384, 288, 192, 128, 96, 64, 32)  # those of Q-DiT, and what divides a hidden size of 192


def evolve(task: Task) -> Found:
    """Group sizes by evolution.py; a budget of bits counts all that is stored for a weight, scales included.

    What is rebuilt: one size for each set of layers that read one input, a whole row among them; crossover and
    mutation half each under a limit of bits; the fitness of methods.md 6.5 for where there is no Inception network, the
    error of final latents from fixed noise. What is not: the ops have one dynamic scale a token, so the sizes are those
    of weights alone; weights are symmetric; they round to nearest meanwhile (the policy's GPTQ comes in `quantize`).
    The best ones are judged by samples that they were not selected on. Every size tried keeps its packed
    weights. Raises Misuse for a family without trajectories and a budget below codes with one scale a row.
    """
    options = task.options
    check_walks(task.source, "q-dit")
    call = {name: torch.from_numpy(value) for name, value in task.calibration.call(0).items()}
    layers = prepare(task, lambda config: call, (task.problem.training_steps,))
    total = sum(unit.parameters for unit in layers.units)
    choices = [_choices(unit, layers.base.layers, task.problem.linears) for unit in layers.units]
    whole, fixed = (0,) * len(choices), layers.prices.fixed
    if task.budget.unit == "bits":
        costs = [[choice.bits / total for choice in row] for row in choices]
    else:
        costs = [[layers.cost(index, choice.layers, 0) for choice in row] for index, row in enumerate(choices)]
    budget = task.budget.amount - fixed
    if task.budget.unit == "bits" and budget < _sum(costs, whole):
        raise Misuse(
            f"budget {task.budget}: codes, one scale a channel and branches take {_sum(costs, whole):.3f} bits.",
            "Give more, e.g. a quarter bit more, or a base with fewer bits.",
        )
    check_is_possible(task.budget, fixed + _sum(costs, whole), [fixed + _sum(costs, g) for g in _alike(choices)])
    searched, others = samples_of(task.calibration, options.trajectories)

    def measured(samples: list[int]) -> Callable[[Genes], float]:
        walk = Walk(layers.network, task.calibration, samples=samples)
        steps = range(len(task.calibration))
        layers.network.choose_float()
        exact = walk.steps(walk.start, steps)
        layers.network.choose(layers.base.layers)

        def error(genes: Genes) -> float:
            policies = _policies(choices, genes)

            def measure() -> float:
                layers.network.choose(policies)
                return latent_error(walk.steps(walk.start, steps), exact)

            told = [[name, policy.model_dump(mode="json")] for name, policy in policies.items()]
            return task.journal.value(["latents", samples, told], measure)

        return error

    found = evolution.evolve(
        measured(searched),
        costs,
        budget=budget,
        seed=task.problem.seed,
        population=options.population,
        generations=options.generations,
        first=[whole],
    )
    judge = measured(others or searched)
    alike = [genes for genes in _alike(choices) if _sum(costs, genes) <= budget + TOLERANCE]
    told = [
        Point(fixed + _sum(costs, genes), judge(genes), _policies(choices, genes))
        for genes in track([*(point.what for point in found[: evolution.PARENTS]), *alike], "search: survivors")
    ]
    note(f"search: {task.journal.measured} measurements")
    return Found(layers.base, told, told[-len(alike) :])


def _choices(unit: Unit, base: Mapping[str, LayerPolicy], linears: Mapping[str, tuple[int, int]]) -> list[Choice]:
    """By rising bits, all that are stored for the unit: a whole row first, then the SIZES that divide K."""
    k = linears[unit.layers[0]][1]
    found = []
    for size in (None, *(size for size in SIZES if size < k and k % size == 0)):
        layers = {name: base[name].model_copy(update={"group_size": size}) for name in unit.layers}
        found.append(Choice(sum(layer_bits(layer, linears[name]) for name, layer in layers.items()), layers))
    return found


def _alike(choices: Sequence[Sequence[Choice]]) -> list[Genes]:
    """One size for all units, a whole row where it does not divide K: what the search is compared with."""
    found = []
    for size in (None, *SIZES):
        sizes = [[next(iter(choice.layers.values())).group_size for choice in row] for row in choices]
        genes = tuple(row.index(size) if size in row else 0 for row in sizes)
        if genes not in found:
            found.append(genes)
    return found


def _policies(choices: Sequence[Sequence[Choice]], genes: Genes) -> dict[str, LayerPolicy]:
    return {name: layer for row, gene in zip(choices, genes, strict=True) for name, layer in row[gene].layers.items()}


def _sum(costs: Sequence[Sequence[float]], genes: Genes) -> float:
    return float(sum(row[gene] for row, gene in zip(costs, genes, strict=True)))
