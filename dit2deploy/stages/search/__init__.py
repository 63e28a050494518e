"""Stage search: a recipe makes the policy of a model. RECIPES is THE list; each has a name, a summary and `search`."""

from pathlib import Path
from typing import Any

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.stages.search import mixed, tq_dit, uniform
from dit2deploy.stages.search.front import take_point
from dit2deploy.stages.search.problem import Problem

__all__ = ["RECIPES", "is_measured", "search", "take_point"]

RECIPES = (*uniform.RECIPES, *tq_dit.RECIPES, *mixed.RECIPES)


def is_measured(recipe: str) -> bool:
    """Whether a recipe measures on a calibration set."""
    return any(entry.name == recipe and isinstance(entry, mixed.MixedRecipe) for entry in RECIPES)


def search(
    model: Path,
    out: Path,
    *,
    recipe: str = "w1.58a4",
    calibration: Path | CalibrationSet | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Policy:
    """Writes the policy that a recipe makes for `model` (a diffusers folder) to the file `out`, and returns it.

    `overrides` are options of the recipe: uniform.Options, for mixed-precision recipes also mixed.Options. Those
    measure on a `calibration` set (its folder); the others need none. Beside `out`, a mixed-precision recipe
    leaves the front of bits and error (.front.json, .front.png) and the journal of its measurements (.journal.jsonl),
    by which a killed search goes on: the same inputs and seed give the same policy to the last byte.

    Raises Misuse for a recipe or an option that does not exist, for values that do not fit the model, and for a
    calibration set that is missing, of another model, or too small.
    """
    # torch: not for those who only want the list
    from dit2deploy.models.load import linears_of, open_model, skeleton
    from dit2deploy.models.places import after_gelu, attentions_of

    model, out = Path(model), Path(out)
    known = {entry.name: entry for entry in RECIPES}
    if recipe not in known:
        raise Misuse(f"search: there is no recipe {recipe!r}.", f"Known: {', '.join(known)}.")
    source = open_model(model)
    empty = skeleton(source)
    shapes = linears_of(empty)
    problem = Problem(
        model=source.class_name,
        linears=shapes,
        roles={name: source.family.role(name) for name in shapes},
        training_steps=(source.scheduler_config or {}).get("num_train_timesteps", 1000),
        seed=seed,
        smoothable=frozenset(reader for fold in source.family.folds(shapes) for reader in fold.readers),
        attentions=tuple(attentions_of(empty)),
        after_gelu=tuple(after_gelu(empty)),
    )
    chosen = known[recipe]
    if not isinstance(chosen, mixed.MixedRecipe):
        policy = chosen.search(problem, **overrides)
    else:
        if calibration is None:
            raise Misuse(
                f"recipe {recipe}: measures on calibration data, and no set is given.",
                f"Make one with `dit2deploy calibrate {model} -o calibration/` and search with --calibration.",
            )
        held = calibration if isinstance(calibration, CalibrationSet) else CalibrationSet.load(Path(calibration))
        policy = chosen.search(problem, source, held, out, **overrides)
    policy.save(out)
    return policy
