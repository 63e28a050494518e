"""Mixed-precision recipes: RobuQ's AMPN, TreeQ's TSS and AdaTSQ's beam, each from a uniform recipe and a budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.stages.search import uniform
from dit2deploy.stages.search.front import Front, FrontPoint, front_file
from dit2deploy.stages.search.journal import Journal
from dit2deploy.stages.search.pareto import best_within
from dit2deploy.stages.search.pareto import front as front_of
from dit2deploy.stages.search.problem import Problem
from dit2deploy.stages.search.task import Found, Options, Task, check

if TYPE_CHECKING:
    from dit2deploy.models.load import ModelFolder

ALGORITHM = 2  # part of every journal key: raise it when the same inputs measure otherwise
_COMMON = ("budget", "weighting", "base", "bits")
# Which options of the uniform recipe a search sets by itself.
_TAKEN = ("activation_bits", "timestep_bounds")


@dataclass(frozen=True)
class MixedRecipe:
    """A search for the bits of each block linear (and timestep group) at an average of `budget`.

    Layers around the blocks stay as the uniform recipe `base` has them, and so do ranks, rotations and roundings.
    Beside the policy come the front (front.py), its picture, and the journal of measurements (journal.py).
    """

    name: str
    options: tuple[str, ...]
    summary: str
    find: Callable[[Task], Found]
    bits: Sequence[int] = Options.bits  # activation widths to choose from, unless other ones are given

    def search(
        self, problem: Problem, source: "ModelFolder", calibration: CalibrationSet, out: Path, **overrides: Any
    ) -> Policy:
        """The policy; writes all but policy.json itself. Raises Misuse for options or data that do not fit."""
        options, rest = self._split(overrides)
        if calibration.manifest.model_sha256 != source.sha256:
            raise Misuse(
                f"{calibration.folder}: was recorded on another model than {source.folder}.",
                "Make it anew with `dit2deploy calibrate`.",
            )
        calibration_sha256 = calibration.sha256
        stamp = [ALGORITHM, source.sha256, calibration_sha256, options.base, rest, options.items, problem.seed]
        journal = Journal(out.with_suffix(".journal.jsonl"), stamp=stamp)
        found = self.find(Task(problem, source, calibration, options, rest, journal))
        told = {
            "recipe": self.name,
            **{name: value for name, value in asdict(options).items() if name in self.options},
            **rest,
            "calibration_sha256": calibration_sha256,
        }
        return self._write(found, options, told, problem, out)

    def _split(self, overrides: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
        known = [*self.options, *(field.name for field in fields(uniform.Options) if field.name not in _TAKEN)]
        for name in overrides:
            if name not in known:
                raise Misuse(f"recipe {self.name}: there is no option {name!r}.", f"Known: {', '.join(known)}.")
        given = {name: value for name, value in overrides.items() if name in self.options}
        options = Options(**{"bits": self.bits, **given})
        check(options)
        return options, {name: value for name, value in overrides.items() if name not in self.options}

    def _write(self, found: Found, options: Options, told: dict[str, Any], problem: Problem, out: Path) -> Policy:
        from dit2deploy.evaluate import front_chart  # matplotlib: not for those who only want the list

        points = front_of([*found.points, *found.uniform])
        chosen = points.index(best_within(points, options.budget))
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
        written = tuple(
            FrontPoint(
                average_bits=round(point.cost, 6),
                error=point.error,
                policy=found.base.model_copy(
                    update={
                        "method": self.name,
                        "options": {**told, "average_bits": round(point.cost, 6)},
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
            budget=options.budget,
            chosen=chosen,
            points=written,
            uniform=tuple((round(point.cost, 6), point.error) for point in found.uniform),
        )
        for point in written:
            point.policy.check_covers(problem.model, problem.linears, where=f"recipe {self.name}")
        schema.save(front, front_file(out))
        front_chart.write(
            [(point.average_bits, point.error) for point in written],
            front.uniform,
            (written[chosen].average_bits, written[chosen].error),
            out.with_suffix(".front"),
        )
        return written[chosen].policy


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


RECIPES = (
    MixedRecipe(
        "robuq-ampn",
        (*_COMMON, "allocate", "items"),
        "bits by sensitivity and knapsack (RobuQ)",
        _ampn,
        bits=(1, 2, 3, 4),  # the paper's set
    ),
    MixedRecipe(
        "treeq-tss",
        (*_COMMON, "allocate", "items", "survivors", "lam", "refine"),
        "bits by tree-structured search (TreeQ)",
        _tss,
    ),
    MixedRecipe(
        "adatsq",
        (*_COMMON, "groups", "beam", "trajectories"),
        "activation bits by timestep group, Pareto beam (AdaTSQ)",
        _adatsq,
    ),
)
