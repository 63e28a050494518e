"""What the cells of the methods table are made of: columns (bit-widths), cases and rows (methods)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import Policy
from dit2deploy.models.load import linears_of, load_transformer, open_model
from dit2deploy.stages.finetune import Settings
from dit2deploy.stages.search import search


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
        plain = {"hadamard": 1, "low_rank": 0, "rounding": "nearest", "clip": "absmax", "grid": grid, "gain": "none"}
        plain["branch_init"] = "alternating"
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
    columns: tuple[str, ...]  # that the method is meant for
    training: Settings | None = None  # of finetune after quantize


def with_blocks(case: Case, policy: Policy, **changes: Any) -> Policy:
    """The policy with other options for its block linears."""
    role = open_model(case.model).family.role
    layers = {
        name: layer.model_copy(update=changes) if layer.is_quantized and role(name) == "block" else layer
        for name, layer in policy.layers.items()
    }
    return policy.model_copy(update={"layers": layers})


def block_linears(model: Path) -> dict[str, tuple[int, int]]:
    """(N, K) of the block linears: they see every token, and hold what columns are named after."""
    network, family = load_transformer(model)
    return {name: shape for name, shape in linears_of(network).items() if family.role(name) == "block"}
