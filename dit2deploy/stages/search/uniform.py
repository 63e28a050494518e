"""Uniform recipes: one format for all block linears, more bits for what surrounds them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import ValidationError

from dit2deploy.artefacts.policy import MOST_MID_RISE, BranchInit, Grid, LayerPolicy, Policy, Weight, check_grid
from dit2deploy.artefacts.schema import first_fault
from dit2deploy.base.errors import Misuse
from dit2deploy.stages.search.problem import Problem

Rounding = Literal["nearest", "gptq", "adaround"]
Clip = Literal["absmax", "gaussian"]
Hessian = Literal["uniform", "fisher"]
Gain = Literal["none", "clip"]

# bits; above, the largest value of a token costs less than clipping it. For Gaussian tokens that is so from 6 bits on
# (methods.md 1.3); rotated tokens of the demo lose by the clip at 4 bits already (docs/methods.md).
GAUSSIAN_UP_TO = 3
# bits. On the demo (ternary weights, branch V3, gaussian clip) it is worth 2.0 dB of the model's output at 2 bits,
# and 0.7 dB at 3, where its codes still fit 4 bits; more bits are not measured.
MID_RISE_UP_TO = 3
LARGEST_HADAMARD = 512
LARGEST_RANK = 16


@dataclass(frozen=True)
class Options:
    """What may be overridden of a recipe; but for `modulation`, of its block linears. None: the recipe's own rule."""

    activation_bits: Sequence[int] | int | None = None  # one for each timestep group, or one for all
    timestep_bounds: Sequence[int] | None = None  # ends of the timestep groups, the last one = training steps
    group_size: int | None = None  # weights that share a scale, along K; None or 0: a whole row
    weight_bits: int | None = None  # codes of at most this width in the format's words; None: all that it holds
    low_rank: int | None = None  # None: by `default_rank`
    rounding: Rounding | None = None  # also of modulation linears below 8 bits
    clip: Clip | None = None  # None: by `default_clip`
    grid: Grid | None = None  # of activations; None: by `default_grid`
    gain: Gain | None = None  # None: by `default_gain`
    hadamard: int | None = None  # block; None: by `default_hadamard`; 1: none
    modulation: Weight | None = None  # weight format of the modulation (adaLN) linears
    branch_init: BranchInit | None = None  # where the branch comes from; None: by `default_branch_init`
    hessian: Hessian | None = None  # how calibration steps count in GPTQ, also of modulation linears; None: uniform
    smoothing: float | None = None  # SmoothQuant's alpha, of the block linears that have a place for it; None: 0


@dataclass(frozen=True)
class UniformRecipe:
    """Every block linear gets `weight` and `activation_bits`; the others keep 8-bit activations.

    Their weights are int8, with two exceptions. `modulation`: adaLN linears see one row a sample, so they cost no time
    but a large share of the bytes (a quarter of FLUX); below 4-bit blocks they become int4. And the output projection
    (a final layer with fewer outputs than inputs) stays as it is: it is small, and its error is the output's.
    """

    name: str
    weight: Weight
    activation_bits: int
    modulation: Weight
    low_rank: bool
    summary: str

    def search(self, problem: Problem, **overrides: Any) -> Policy:
        """The policy. Raises Misuse for an override that does not exist or does not fit the model."""
        options = _options(overrides)
        bounds = tuple(options.timestep_bounds or (problem.training_steps,))
        if bounds[-1] != problem.training_steps:
            raise Misuse(
                f"timestep_bounds {list(bounds)}: the last one is not {problem.training_steps}.",
                "End with the number of training steps of the scheduler.",
            )
        bits = _bits(options.activation_bits or self.activation_bits, len(bounds))
        if options.smoothing and not problem.smoothable:
            raise Misuse(
                f"smoothing {options.smoothing}: no layer of a {problem.model} is known to have a place for it.",
                "Leave it out, or name the places in the family's `folds` (models/folds.py).",
            )
        try:
            layers = {
                name: self._layer(problem.roles[name], shape, bits, options, name in problem.smoothable)
                for name, shape in problem.linears.items()
            }
            policy = Policy(
                method="uniform",
                options={"recipe": self.name, **overrides},
                seed=problem.seed,
                model=problem.model,
                timestep_bounds=bounds,
                layers=layers,
            )
        except ValidationError as error:
            raise Misuse(f"recipe {self.name}: {first_fault(error)}.", "Change that option.") from None
        policy.check_covers(problem.model, problem.linears, where=f"recipe {self.name}")
        return policy

    def _layer(
        self, role: str, shape: tuple[int, int], bits: tuple[int, ...], options: Options, smoothable: bool
    ) -> LayerPolicy:
        n, k = shape
        if role == "block":
            rank = default_rank(shape) if self.low_rank else 0
            rounding = options.rounding or default_rounding(self.weight)
            return LayerPolicy(
                weight=self.weight,
                group_size=options.group_size or None,
                weight_bits=options.weight_bits,
                activation_bits=bits,
                clip=options.clip or default_clip(max(bits)),
                grid=options.grid or default_grid(bits, max(bits)),
                gain=options.gain or default_gain(options.clip or default_clip(max(bits))),
                hadamard=default_hadamard(k) if options.hadamard is None else options.hadamard,
                low_rank=rank if options.low_rank is None else options.low_rank,
                rounding=rounding,
                branch_init=options.branch_init or default_branch_init(rounding),
                hessian=options.hessian or "uniform",
                smoothing=(options.smoothing or 0.0) if smoothable else 0.0,
            )
        if role == "final" and n < k:
            return LayerPolicy(weight="float")
        weight = (options.modulation or self.modulation) if role == "modulation" else "int8"
        if weight == "float":
            return LayerPolicy(weight="float")
        rounding = default_rounding(weight)
        if rounding != "nearest":
            rounding = options.rounding or rounding
        return LayerPolicy(
            weight=weight,
            activation_bits=(8,) * len(bits),
            hadamard=default_hadamard(k),
            rounding=rounding,
            hessian=(options.hessian or "uniform") if rounding == "gptq" else "uniform",
        )


def default_hadamard(k: int) -> int:
    """The largest power of two that divides K, up to LARGEST_HADAMARD."""
    return min(k & -k, LARGEST_HADAMARD)


def default_rank(shape: tuple[int, int]) -> int:
    """The largest power of two up to min(N, K) / 24 and LARGEST_RANK: 16 for DiT-XL/2 (methods.md 11, item 6), 8 for a
    hidden size of 192. In float16 it adds at most 4/3 bits a weight."""
    rank = min(min(shape) // 24, LARGEST_RANK)
    return 1 << (rank.bit_length() - 1) if rank else 0


def default_rounding(weight: Weight) -> Rounding:
    """GPTQ, where there is enough to gain: not for int8."""
    return "nearest" if weight == "int8" else "gptq"


def default_branch_init(rounding: Rounding) -> BranchInit:
    """Fitted once more to what GPTQ leaves: worth 0.8 dB of the model's output on the demo at W1.58A4, 0.5 at W1.58A2
    (docs/methods.md). Without the inputs' moments, what the weight alone tells."""
    return "refit" if rounding == "gptq" else "alternating"


def default_clip(bits: float) -> Clip:
    return "gaussian" if bits <= GAUSSIAN_UP_TO else "absmax"


def default_gain(clip: Clip) -> Gain:
    """Given back where a clip takes it: worth 1.1 dB of the model's output on the demo at W1.58A2, 0.7 at W1.58A3."""
    return "clip" if clip == "gaussian" else "none"


def default_grid(bits: Iterable[int], usual: float) -> Grid:
    """For a layer that may get any of `bits`, mostly about `usual` of them."""
    every = list(bits)
    few = usual <= MID_RISE_UP_TO and max(every) <= MOST_MID_RISE
    return "mid-rise" if few or min(every) == 1 else "mid-tread"


def rule_of(overrides: Mapping[str, Any], bits: Sequence[int], usual: float) -> dict[str, str]:
    """Clip and grid of a layer's activations: what `overrides` say, or what suits the bits (see `default_grid`).

    Raises Misuse for a grid that does not have one of the bits.
    """
    grid = overrides.get("grid") or default_grid(bits, usual)
    try:
        check_grid(bits, grid)
    except ValueError as error:
        raise Misuse(
            f"bits {list(bits)}: {error}.", "Choose from other bits, or leave the grid to the recipe."
        ) from None
    clip = overrides.get("clip") or default_clip(usual)
    return {"clip": clip, "grid": grid, "gain": overrides.get("gain") or default_gain(clip)}


def _bits(value: Sequence[int] | int, groups: int) -> tuple[int, ...]:
    bits = (value,) * groups if isinstance(value, int) else tuple(value)
    if len(bits) != groups:
        raise Misuse(
            f"activation_bits {list(bits)}: there are {groups} timestep groups.", "Give one number for each group."
        )
    return bits


def _options(overrides: Mapping[str, Any]) -> Options:
    known = [field.name for field in fields(Options)]
    for name in overrides:
        if name not in known:
            raise Misuse(f"search: there is no option {name!r}.", f"Known: {', '.join(known)}.")
    return Options(**overrides)


def _recipe(weight: Weight, bits: int, *, modulation: Weight, low_rank: bool) -> UniformRecipe:
    short = {"ternary": "1.58", "int3": "3", "int4": "4", "int8": "8"}[weight]
    summary = f"{weight} weights, {bits}-bit activations, modulation {modulation}"
    if default_rounding(weight) == "gptq":
        summary += ", GPTQ"
    if low_rank:
        summary += ", low-rank branch"
    return UniformRecipe(f"w{short}a{bits}", weight, bits, modulation, low_rank, summary)


RECIPES = (
    _recipe("int8", 8, modulation="int8", low_rank=False),
    _recipe("int4", 8, modulation="int8", low_rank=False),
    _recipe("int4", 4, modulation="int8", low_rank=True),
    _recipe("int3", 3, modulation="int4", low_rank=True),
    _recipe("ternary", 8, modulation="int4", low_rank=True),
    _recipe("ternary", 4, modulation="int4", low_rank=True),
)
