"""What a mixed-precision search is given and what it gives back; importing this file needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.formats import FORMATS
from dit2deploy.stages.search.journal import Journal
from dit2deploy.stages.search.pareto import TOLERANCE, Point
from dit2deploy.stages.search.problem import Problem

if TYPE_CHECKING:
    from dit2deploy.models.load import ModelFolder

Weighting = Literal["macs", "parameters", "layers"]
Allocate = Literal["activations", "weights"]


@dataclass(frozen=True)
class Options:
    """What may be said to a mixed-precision recipe; each takes those that its `options` names, and besides them the
    options of the uniform recipe `base`."""

    budget: float = 3.0  # average bits over the block linears; stored bits a weight for allocate "weights"
    weighting: Weighting = "macs"  # what a layer counts in that average
    base: str = "w1.58a4"  # the uniform recipe that says all else: formats, ranks, the layers around the blocks
    allocate: Allocate = "activations"
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8)  # activation widths to choose from; weights: all formats
    items: int = 32  # samples of the calibration set on which configurations are compared
    survivors: int = 16  # TSS: configurations that a node keeps (K of the paper's figure)
    lam: float = 1.0  # TSS, environment of a node (ENG): 0 full precision .. 1 quantized at the budget
    refine: bool = False  # TSS: swaps of widths after the root
    groups: int = 5  # AdaTSQ: timestep groups
    beam: int = 32  # AdaTSQ: paths that are kept (M)
    trajectories: int = 4  # AdaTSQ: samples that are denoised; twice as many others judge the survivors


def check(options: Options) -> None:
    """Misuse for values that no search can use."""
    for name, allowed in (("weighting", get_args(Weighting)), ("allocate", get_args(Allocate))):
        if getattr(options, name) not in allowed:
            raise Misuse(f"{name} {getattr(options, name)!r} is unknown.", f"Use one of {', '.join(allowed)}.")
    bits = list(options.bits)
    if bits != sorted(set(bits)) or len(bits) < 2 or not 1 <= bits[0] <= bits[-1] <= 8:
        raise Misuse(f"bits {bits}: no rising widths of 1 .. 8.", "Give at least two, e.g. 2,3,4,6,8.")
    for name, least in (("items", 2), ("survivors", 2), ("groups", 1), ("beam", 1), ("trajectories", 1)):
        if getattr(options, name) < least:
            raise Misuse(f"{name} {getattr(options, name)} is too small.", f"Give at least {least}.")
    if not 0 <= options.lam <= 1:
        raise Misuse(f"lam {options.lam} is not in 0 .. 1.", "0: the others in full precision; 1: quantized.")
    widths = [fmt.bits for fmt in FORMATS] if options.allocate == "weights" else bits
    if not widths[0] - TOLERANCE <= options.budget <= widths[-1]:
        raise Misuse(
            f"budget {options.budget}: no average of {', '.join(f'{width:g}' for width in widths)} bits is that.",
            f"Give {widths[0]:g} .. {widths[-1]:g}" + (", or other bits." if options.allocate != "weights" else "."),
        )


@dataclass(frozen=True)
class Task:
    """One search: the model, its calibration set, the options, and where measurements are kept."""

    problem: Problem
    source: "ModelFolder"
    calibration: CalibrationSet
    options: Options
    base_overrides: Mapping[str, Any]
    journal: Journal


@dataclass(frozen=True)
class Found:
    """Points whose `what` is the policy of the layers that were searched; `uniform`: all of them at one width."""

    base: Policy
    points: list[Point]
    uniform: list[Point]
