"""Searched recipes: RobuQ's AMPN, TreeQ's TSS, AdaTSQ's beam, Q-DiT's group sizes; a uniform recipe and a budget."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.device_table import DeviceTable
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.stages.search import uniform
from dit2deploy.stages.search.budget import Budget, Unit, parse
from dit2deploy.stages.search.front import Front, FrontPoint, front_file
from dit2deploy.stages.search.journal import Journal
from dit2deploy.stages.search.pareto import best_within
from dit2deploy.stages.search.pareto import front as front_of
from dit2deploy.stages.search.problem import Problem
from dit2deploy.stages.search.task import Found, Options, Task, check

if TYPE_CHECKING:
    from dit2deploy.models.load import ModelFolder

ALGORITHM = 3  # part of every journal key: raise it when the same inputs measure otherwise
_COMMON = ("budget", "weighting", "device", "base", "bits")
# What a policy's options call its cost.
COST_NAMES: dict[Unit, str] = {"bits": "average_bits", "bytes": "bytes", "milliseconds": "milliseconds"}


@dataclass(frozen=True)
class MixedRecipe:
    """A search for the bits of each block linear (and timestep group), or its group size, within `budget`.

    Layers around the blocks stay as the uniform recipe `base` has them, and so do ranks, rotations and roundings.
    Beside the policy come the front (front.py), its picture, and the journal of measurements (journal.py).
    """

    name: str
    options: tuple[str, ...]
    summary: str
    find: Callable[[Task], Found]
    taken: tuple[str, ...] = ("activation_bits", "timestep_bounds")  # options of the base that the search sets itself
    defaults: Mapping[str, Any] = field(default_factory=dict)  # where they are not those of Options

    def search(
        self, problem: Problem, source: "ModelFolder", calibration: CalibrationSet, out: Path, **overrides: Any
    ) -> Policy:
        """The policy; writes all but policy.json itself. Raises Misuse for options or data that do not fit."""
        options, budget, rest = self._split(overrides)
        held = options.device
        device = held if held is None or isinstance(held, DeviceTable) else DeviceTable.load(Path(held))
        if calibration.manifest.model_sha256 != source.sha256:
            raise Misuse(
                f"{calibration.folder}: was recorded on another model than {source.folder}.",
                "Make it anew with `dit2deploy calibrate`.",
            )
        calibration_sha256 = calibration.sha256
        stamp = [ALGORITHM, source.sha256, calibration_sha256, options.base, rest, options.items, problem.seed]
        journal = Journal(out.with_suffix(".journal.jsonl"), stamp=stamp)
        task = Task(problem, source, calibration, options, budget, device, rest, journal)
        found = self.find(task)
        told = {
            "recipe": self.name,
            **{name: getattr(options, name) for name in self.options if name != "device"},
            "budget": budget.told,
            **rest,
            "calibration_sha256": calibration_sha256,
        }
        if device is not None:
            told |= {"device": device.device, "device_sha256": device.sha256}
        return self._write(found, task, told, out)

    def _split(self, overrides: Mapping[str, Any]) -> tuple[Options, Budget, dict[str, Any]]:
        known = [*self.options, *(entry.name for entry in fields(uniform.Options) if entry.name not in self.taken)]
        for name in overrides:
            if name not in known:
                raise Misuse(f"recipe {self.name}: there is no option {name!r}.", f"Known: {', '.join(known)}.")
        given = {name: value for name, value in overrides.items() if name in self.options}
        options = Options(**{**self.defaults, **given})
        budget = parse(options.budget)
        check(options, budget, settled=[name for name in self.defaults if name not in self.options])
        return options, budget, {name: value for name, value in overrides.items() if name not in self.options}

    def _write(self, found: Found, task: Task, told: dict[str, Any], out: Path) -> Policy:
        from dit2deploy.evaluate import front_chart  # matplotlib: not for those who only want the list

        options, budget, problem = task.options, task.budget, task.problem
        points = front_of([*found.points, *found.uniform])
        chosen = points.index(best_within(points, budget.amount))
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
        cost_name = COST_NAMES[budget.unit]
        written = tuple(
            FrontPoint(
                cost=round(point.cost, 6),
                error=point.error,
                policy=found.base.model_copy(
                    update={
                        "method": self.name,
                        "options": {**told, cost_name: round(point.cost, 6)},
                        "layers": {**found.base.layers, **point.what},
                    }
                ),
            )
            for point in points
        )
        front = Front(
            recipe=self.name,
            allocate=options.allocate,
            weighting=options.weighting,
            unit=budget.unit,
            device="" if task.device is None else task.device.device,
            budget=budget.amount,
            chosen=chosen,
            points=written,
            uniform=tuple((round(point.cost, 6), point.error) for point in found.uniform),
        )
        for point in written:
            point.policy.check_covers(problem.model, problem.linears, where=f"recipe {self.name}")
        schema.save(front, front_file(out))
        label, factor = _axis(front)
        front_chart.write(
            [(point.cost * factor, point.error) for point in written],
            [(cost * factor, error) for cost, error in front.uniform],
            (written[chosen].cost * factor, written[chosen].error),
            out.with_suffix(".front"),
            x_label=label,
        )
        return written[chosen].policy


def _axis(front: Front) -> tuple[str, float]:
    """What the picture of a front says of its costs, and what they are multiplied by."""
    if front.unit == "bytes":
        return "checkpoint, MB", 1e-6
    if front.unit == "milliseconds":
        return f"linears of a step, ms ({front.device})", 1.0
    return "average bits", 1.0


# What measures needs torch, and comes when a search begins: the list of recipes is had without.
def _ampn(task: Task) -> Found:
    from dit2deploy.stages.search.static import knapsack

    return knapsack(task)


def _tss(task: Task) -> Found:
    from dit2deploy.stages.search.static import tree

    return tree(task)


def _adatsq(task: Task) -> Found:
    from dit2deploy.stages.search.trajectories import beam

    return beam(task)


def _hawq(task: Task) -> Found:
    from dit2deploy.stages.search.traces import knapsack

    return knapsack(task)


def _qdit(task: Task) -> Found:
    from dit2deploy.stages.search.group_sizes import evolve

    return evolve(task)


RECIPES = (
    MixedRecipe(
        "robuq-ampn",
        (*_COMMON, "allocate", "items"),
        "bits by sensitivity and knapsack (RobuQ)",
        _ampn,
        defaults={"bits": (1, 2, 3, 4)},  # the paper's set
    ),
    MixedRecipe(
        "treeq-tss",
        (*_COMMON, "allocate", "items", "survivors", "lam", "refine"),
        "bits by tree-structured search (TreeQ)",
        _tss,
    ),
    MixedRecipe(
        "adatsq",
        (*_COMMON, "groups", "beam", "trajectories", "probes"),
        "activation bits by timestep group, Pareto beam (AdaTSQ)",
        _adatsq,
        defaults={"bits": (2, 3, 4, 5, 6)},  # all of a layer share a grid, and 8 bits have no mid-rise one
    ),
    MixedRecipe(
        "hawq",
        ("budget", "weighting", "device", "base", "items"),
        "weight formats by Hessian trace and weight error (HAWQ-V2)",
        _hawq,
        defaults={"allocate": "weights"},
    ),
    MixedRecipe(
        "q-dit",
        ("budget", "device", "base", "trajectories", "population", "generations"),
        "group sizes by evolution (Q-DiT)",
        _qdit,
        taken=("group_size", "timestep_bounds"),
        defaults={"allocate": "groups", "weighting": "parameters", "base": "w4a8", "budget": 4.25},
    ),
)
