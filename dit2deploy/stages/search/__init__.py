"""Stage search: a recipe makes the policy of a model. RECIPES is THE list; each has a name, a summary and `search`."""

from pathlib import Path
from typing import Any

from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.stages.search import uniform
from dit2deploy.stages.search.problem import Problem

RECIPES = (*uniform.RECIPES,)


def search(model: Path, out: Path, *, recipe: str = "w1.58a4", seed: int = 0, **overrides: Any) -> Policy:
    """Writes the policy that a recipe makes for `model` (a diffusers folder) to the file `out`, and returns it.

    `overrides` are options of the recipe (uniform.Options). Raises Misuse for a recipe or an option that does not
    exist and for values that do not fit the model.
    """
    from dit2deploy.models.load import linears, open_model  # torch: not for those who only want the list

    known = {entry.name: entry for entry in RECIPES}
    if recipe not in known:
        raise Misuse(f"search: there is no recipe {recipe!r}.", f"Known: {', '.join(known)}.")
    source = open_model(Path(model))
    shapes = linears(source)
    problem = Problem(
        model=source.class_name,
        linears=shapes,
        roles={name: source.family.role(name) for name in shapes},
        training_steps=(source.scheduler_config or {}).get("num_train_timesteps", 1000),
        seed=seed,
    )
    policy = known[recipe].search(problem, **overrides)
    policy.save(Path(out))
    return policy
