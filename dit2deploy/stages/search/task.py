"""What a mixed-precision search is given and what it gives back; importing this file needs no torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.device_table import DeviceTable
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.formats import FORMATS
from dit2deploy.stages.search.budget import Budget
from dit2deploy.stages.search.journal import Journal
from dit2deploy.stages.search.pareto import TOLERANCE, Point
from dit2deploy.stages.search.problem import Problem

if TYPE_CHECKING:
    from dit2deploy.models.load import ModelFolder

Weighting = Literal["macs", "parameters", "layers"]
Allocate = Literal["activations", "weights", "groups"]
CHOSEN: tuple[Allocate, ...] = ("activations", "weights")  # where the recipe leaves it open
_POSITIVE = ("groups", "beam", "trajectories", "probes", "population", "generations")


@dataclass(frozen=True)
class Options:
    """What may be said to a mixed-precision recipe; each takes those that its `options` names, and besides them the
    options of the uniform recipe `base`."""

    # A number: average bits over the block linears (stored bits a weight for allocate "weights"); "1.8MB": bytes of the
    # checkpoint's tensors; "3.2ms": a step's linears on `device`, see budget.py.
    budget: float | str = 3.0
    weighting: Weighting = "macs"  # what a layer counts in an average of bits
    device: Path | DeviceTable | None = None  # from `measure-ops`
    base: str = "w1.58a4"  # the uniform recipe that says all else: formats, ranks, the layers around the blocks
    allocate: Allocate = "activations"
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8)  # activation widths to choose from; weights: all formats
    items: int = 32  # samples of the calibration set on which configurations are compared
    survivors: int = 16  # TSS: configurations that a node keeps (K of the paper's figure)
    lam: float = 1.0  # TSS, environment of a node (ENG): 0 full precision .. 1 quantized at the budget
    refine: bool = False  # TSS: swaps of widths after the root
    groups: int = 5  # AdaTSQ: timestep groups
    beam: int = 32  # AdaTSQ: paths that are kept (M)
    trajectories: int = 4  # AdaTSQ, Q-DiT: samples that are denoised; twice as many others judge the survivors
    probes: int = 4  # AdaTSQ: random projections of the output behind a Fisher score
    population: int = 20  # Q-DiT: configurations of a generation (50 in its code)
    generations: int = 10  # Q-DiT: after the first (20 in its code)


def check(options: Options, budget: Budget, settled: Collection[str] = ()) -> None:
    """Misuse for values that no search can use; those of `settled` are the recipe's own."""
    for name, allowed in (("weighting", get_args(Weighting)), ("allocate", CHOSEN)):
        if name not in settled and getattr(options, name) not in allowed:
            raise Misuse(f"{name} {getattr(options, name)!r} is unknown.", f"Use one of {', '.join(allowed)}.")
    bits = list(options.bits)
    if bits != sorted(set(bits)) or len(bits) < 2 or not 1 <= bits[0] <= bits[-1] <= 8:
        raise Misuse(f"bits {bits}: no rising widths of 1 .. 8.", "Give at least two, e.g. 2,3,4,6,8.")
    for name, least in (("items", 2), ("survivors", 2), *((name, 1) for name in _POSITIVE)):
        if getattr(options, name) < least:
            raise Misuse(f"{name} {getattr(options, name)} is too small.", f"Give at least {least}.")
    if not 0 <= options.lam <= 1:
        raise Misuse(f"lam {options.lam} is not in 0 .. 1.", "0: the others in full precision; 1: quantized.")
    if (budget.unit == "milliseconds") != (options.device is not None):
        raise Misuse(
            f"budget {budget}: " + ("a device table says nothing of it." if options.device else "on which device?"),
            "Give a budget in milliseconds (3.2ms) together with --device, a table of `dit2deploy measure-ops`.",
        )
    if budget.unit == "bytes" and options.allocate == "activations":
        raise Misuse(
            f"budget {budget}: activation bits change no byte of a checkpoint.",
            "Choose weights (--allocate weights of robuq-ampn and treeq-tss), or give bits or milliseconds.",
        )
    if options.allocate == "groups":
        return  # its search knows which budgets can be met
    widths = [fmt.bits for fmt in FORMATS] if options.allocate == "weights" else bits
    if budget.unit == "bits" and not widths[0] - TOLERANCE <= budget.amount <= widths[-1]:
        raise Misuse(
            f"budget {budget.amount}: no average of {', '.join(f'{width:g}' for width in widths)} bits is that.",
            f"Give {widths[0]:g} .. {widths[-1]:g}" + (", or other bits." if options.allocate != "weights" else "."),
        )


@dataclass(frozen=True)
class Task:
    """One search: the model, its calibration set, the options, and where measurements are kept."""

    problem: Problem
    source: "ModelFolder"
    calibration: CalibrationSet
    options: Options
    budget: Budget
    device: DeviceTable | None
    base_overrides: Mapping[str, Any]
    journal: Journal


@dataclass(frozen=True)
class Found:
    """Points whose `what` is the policy of the layers that were searched; `uniform`: all of them at one width."""

    base: Policy
    points: list[Point]
    uniform: list[Point]
