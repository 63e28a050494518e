"""Weight formats by sensitivity without measuring the network: Hessian traces times weight errors (HAWQ-V2).

HAWQ-V2 (https://arxiv.org/abs/1911.03852): the loss rises by the mean eigenvalue of a layer's Hessian times the squared
change of its weights, so one trace a layer prices every format. [inferred] Ours is the trace of the Gauss-Newton matrix
of the output, by random projections (quantizers/fisher.py), where HAWQ has the loss's. AMPN and TSS (static.py) measure
the network instead, once a layer and format at least.
"""

from collections.abc import Sequence

from dit2deploy.quantizers.fisher import PROBES
from dit2deploy.stages.search import ampn
from dit2deploy.stages.search.measure import Measure
from dit2deploy.stages.search.pareto import Point
from dit2deploy.stages.search.static import Costs, choices_of, static
from dit2deploy.stages.search.task import Found, Task
from dit2deploy.stages.search.trajectories import sensitivities
from dit2deploy.stages.search.units import Choice, Layers


def knapsack(task: Task) -> Found:
    """Formats of least sum of `increases` at each of AMPN's budgets; only these are measured, for the front."""
    return static(task, _knapsack)


def increases(layers: Layers, choices: Sequence[Sequence[Choice]], traces: Sequence[float]) -> list[list[float]]:
    """[units][choices]: trace / weights * |W - Q(W)|^2 of a unit; `traces` are those of whole units."""
    return [
        [
            trace
            / unit.parameters
            * sum(layers.network.layers[name].weight_error(policy) for name, policy in choice.layers.items())
            for choice in row
        ]
        for unit, row, trace in zip(layers.units, choices, traces, strict=True)
    ]


def _knapsack(task: Task, layers: Layers, measure: Measure, costs: Costs, target: int) -> list[Point]:
    layers.network.choose_float()
    traces = task.journal.value(
        "traces",
        lambda: sensitivities(layers.network, layers.units, measure.parts[0], seed=task.problem.seed, probes=PROBES),
    )
    layers.network.choose(layers.base.layers)
    choices = [choices_of(unit, layers.base, task.options, task.base_overrides) for unit in layers.units]
    return ampn.answers(
        increases(layers, choices, traces), measure.mean, costs, budget=task.budget.amount - layers.prices.fixed
    )
