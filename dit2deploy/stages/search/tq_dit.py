"""TQ-DiT: static two-region quantizers after softmax and GELU in timestep groups, attention's products included."""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dit2deploy.artefacts.policy import AttentionPolicy, Policy
from dit2deploy.artefacts.schema import first_fault
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import note
from dit2deploy.stages.search import uniform
from dit2deploy.stages.search.problem import Problem

GROUPS = 10  # of the authors' run script


@dataclass(frozen=True)
class TqDit:
    """`bits` for weights and activations of the block linears and for all operands of attention's two products.

    TQ-DiT, https://arxiv.org/abs/2502.04056; methods.md 7. The steps themselves are found by `quantize`
    (stages/quantize/regions.py). What differs from the paper: weights have a scale an output channel, by least squared
    error, where it searches one a tensor; activations that it gives one static step have one a token, found at run
    time; the modulation and the layers around the blocks are those of the uniform recipe w8a8. There is no 6-bit
    format: 6-bit weights are int8 words whose codes are limited to 6 bits.
    """

    name: str
    bits: int
    summary: str

    def search(self, problem: Problem, *, groups: int = GROUPS, **overrides: Any) -> Policy:
        """The policy; `groups` equal parts of the training steps share tables. Other options are those of uniform
        recipes. Raises Misuse for options that do not exist or fit, and for a model without a place for any of it."""
        if not problem.attentions and not problem.after_gelu:
            raise Misuse(
                f"recipe {self.name}: {problem.model} has neither an attention nor a GELU of a known form.",
                "Take a uniform recipe, e.g. w8a8.",
            )
        if not problem.attentions:
            note(f"recipe {self.name}: attentions of {problem.model} are not described, their products stay in float")
        steps = problem.training_steps
        if not 1 <= groups <= steps:
            raise Misuse(
                f"groups {groups} is not in 1 .. {steps}.", f"Give the number of timestep groups, e.g. {GROUPS}."
            )
        bounds = overrides.pop("timestep_bounds", None) or tuple(steps * (i + 1) // groups for i in range(groups))
        plain = {"activation_bits": self.bits, "hadamard": 1, "weight_bits": None if self.bits == 8 else self.bits}
        base = next(recipe for recipe in uniform.RECIPES if recipe.name == "w8a8").search(
            problem, **{**plain, **overrides}, timestep_bounds=bounds
        )
        layers = {
            name: layer.model_copy(update={"regions": "gelu"}) if name in problem.after_gelu else layer
            for name, layer in base.layers.items()
        }
        widths = (self.bits,) * len(bounds)
        try:
            return Policy(
                method="tq-dit",
                options={"recipe": self.name, "groups": len(bounds), **overrides},
                seed=problem.seed,
                model=problem.model,
                timestep_bounds=bounds,
                layers={name: layer.model_dump() for name, layer in layers.items()},
                attentions={name: AttentionPolicy(bits=widths, probability_bits=widths) for name in problem.attentions},
            )
        except ValidationError as error:
            raise Misuse(f"recipe {self.name}: {first_fault(error)}.", "Change that option.") from None


RECIPES = (
    TqDit("tq-dit", 8, "W8A8, two regions after softmax and GELU, integer attention, timestep groups (TQ-DiT)"),
    TqDit("tq-dit-w6a6", 6, "the same at W6A6; weights are 6-bit codes in int8 words"),
)
