"""The front of a search beside its policy: POLICY.front.json, any point of which can take the policy's place."""

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.stages.search.budget import Unit


class FrontPoint(schema.Record):
    cost: float  # in the front's unit; bits are averaged over the layers that were searched, weighted as it says
    error: float  # relative squared error on calibration data, see the recipe
    policy: Policy


class Front(schema.Record):
    """Points by rising cost and falling error; `chosen` is the index of the one that policy.json holds."""

    schema_version: Literal[2] = 2
    kind: Literal["search_front"] = "search_front"
    recipe: str
    allocate: str
    weighting: str
    unit: Unit
    device: str = ""  # of milliseconds
    budget: float
    chosen: int
    points: tuple[FrontPoint, ...]
    uniform: tuple[tuple[float, float], ...]  # cost and error with all layers at one width or format, to compare with

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, value: Any) -> Any:
        return upgrade_from_1(value) if isinstance(value, dict) and value.get("schema_version") == 1 else value


def upgrade_from_1(value: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew average bits only."""
    points = [
        {**{name: part for name, part in point.items() if name != "average_bits"}, "cost": point.get("average_bits")}
        for point in value.get("points", ())
    ]
    return {**value, "schema_version": 2, "unit": "bits", "points": points}


def front_file(policy: Path) -> Path:
    """Where the front of the search that wrote `policy` lies."""
    return policy.with_suffix(".front.json")


def take_point(model: Path, out: Path, index: int) -> Policy:
    """Writes point `index` of the front beside the policy file `out` to `out`, and returns it.

    Raises Misuse where there is no front, no such point, or `model` is another one than was searched.
    """
    from dit2deploy.models.load import linears, open_model  # torch: not for those who only want the list

    source, file = open_model(Path(model)), front_file(Path(out))
    front = schema.load(Front, file, cure="Search with a mixed-precision recipe first, with the same --out.")
    if not 0 <= index < len(front.points):
        raise Misuse(f"{file}: has no point {index}.", f"Choose one of 0 .. {len(front.points) - 1}.")
    policy = front.points[index].policy
    policy.check_covers(source.class_name, linears(source), where=str(file))
    policy.save(Path(out))
    return policy
