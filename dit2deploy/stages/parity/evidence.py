"""What is run for a parity: the engine and both PyTorch models on the same inputs, from the same noise."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import RunResults

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import note, track
from dit2deploy.sampling import Denoise, Scheduler, initial_noise, trajectory
from dit2deploy.stages.parity.compare import recorded, run
from dit2deploy.stages.parity.references import Reference, References
from dit2deploy.stages.parity.runners import OUTPUT, EngineRunner, TorchRunner
from dit2deploy.targets import Target

Step = TypeVar("Step")
SAMPLES = 4
GUIDANCE = 1.5
LAYER_STEPS = 3  # first, middle and last: all layers of a step are in memory at once
_CLASS_CONDITIONAL = ("hidden_states", "timestep", "class_labels")


@dataclass(frozen=True)
class Problem:
    """Which inputs are compared: single steps, and, for class-conditional models, the trajectory they lie on."""

    bundle: Bundle
    feeds: list[dict[str, np.ndarray]]
    steps: int
    seed: int
    trajectory_reason: str  # why there is no trajectory, or ""

    @property
    def scheduler(self) -> Scheduler:
        return Scheduler.from_config(self.bundle.scheduler_config or {})

    @property
    def timesteps(self) -> list[int]:
        """Of the trajectory."""
        return self.scheduler.timesteps(self.steps).tolist()


@dataclass
class Side:
    """What one of the three gave: outputs of the single steps, of all layers in a few of them, and the latents of the
    trajectory after each step. None: `reason`."""

    reason: str = ""
    steps: RunResults | None = None
    layers: RunResults | None = None
    latents: list[np.ndarray] | None = None


@dataclass
class Evidence:
    """`feeds`: inputs of the single steps. `followed`: PyTorch's layers, each going on from the engine's before it.
    `divided`: layers that full precision has no layer to compare with, as smoothing divides their outputs."""

    feeds: list[dict[str, np.ndarray]]
    engine: Side
    quantized: Side
    full_precision: Side
    followed: RunResults | None = None
    divided: tuple[str, ...] = ()


def problem_of(bundle: Bundle, references: References, *, steps: int, seed: int) -> Problem:
    """Steps of a new trajectory where the quantized model is at hand to walk it, else those that the bundle holds."""
    names = {port.name for port in bundle.manifest.inputs}
    reason = ""
    if names != set(_CLASS_CONDITIONAL):
        reason = "only class-conditional models have a trajectory without a text encoder"
    elif bundle.scheduler_config is None:
        reason = "the bundle has no scheduler"
    elif references.quantized.load is None:
        reason = references.quantized.reason
    if reason and not references.feeds:
        raise Misuse(
            f"{bundle.folder}: holds no recorded steps, and there is no trajectory: {reason}.",
            "Build the bundle with --calibration, or give --checkpoint.",
        )
    return Problem(bundle, references.feeds if reason else [], steps, seed, reason)


def gather(problem: Problem, target: Target, references: References) -> Evidence:
    """Runs all that can be run; models may be large, so only one of PyTorch's is in memory at a time."""
    bundle = problem.bundle
    evidence = Evidence(
        problem.feeds, Side(), Side(references.quantized.reason), Side(references.full_precision.reason)
    )
    module = references.quantized.load() if references.quantized.load else None
    if problem.trajectory_reason:
        evidence.quantized.steps = _steps(problem, references.quantized, module, evidence.feeds)
    else:
        walk = _walk(problem, _torch(references.quantized, module, bundle, ()))
        evidence.feeds, evidence.quantized.latents = walk.feeds, walk.latents
        evidence.quantized.steps = recorded(references.quantized.name, [{OUTPUT: output} for output in walk.outputs])
    _run_engine(problem, target, evidence)
    chosen, layers = few(evidence.feeds), tuple(bundle.manifest.layers)
    if module is not None:
        _run_layers(bundle, target, chosen, evidence.engine)
        if evidence.engine.layers is not None:
            evidence.followed = _follow(references.quantized, module, bundle, chosen, evidence.engine.layers)
            evidence.quantized.layers = run(_torch(references.quantized, module, bundle, layers), chosen)

    module = references.full_precision.load() if references.full_precision.load else None
    full = evidence.full_precision
    full.steps = _steps(problem, references.full_precision, module, evidence.feeds)
    if module is not None:
        if not problem.trajectory_reason:
            full.latents = _walk(problem, _torch(references.full_precision, module, bundle, ())).latents
        evidence.divided = _divided(bundle, module)
        same = tuple(name for name in layers if name not in evidence.divided)
        if same and evidence.engine.layers is not None:
            full.layers = run(_torch(references.full_precision, module, bundle, same), chosen)
    return evidence


def _divided(bundle: Bundle, module: Any) -> tuple[str, ...]:
    """Layers of the bundle that take the factors of others: the linears before what the policy smooths."""
    from dit2deploy.models import family_of
    from dit2deploy.models.load import linears_of
    from dit2deploy.quantizers.smoothing import smoothed

    family, policy = family_of(bundle.manifest.model), bundle.policy
    wanted = smoothed(policy, family.folds(linears_of(module))) if family and policy else ()
    producers = {producer.layer for fold, _ in wanted for producer in fold.producers}
    return tuple(name for name in bundle.manifest.layers if name in producers)


def _run_engine(problem: Problem, target: Target, evidence: Evidence) -> None:
    with closing(target.open(problem.bundle)) as engine:
        runner = EngineRunner(problem.bundle, target.name, engine)
        if not problem.trajectory_reason:
            evidence.engine.latents = _walk(problem, runner).latents
        evidence.engine.steps = run(runner, evidence.feeds)


def _run_layers(bundle: Bundle, target: Target, feeds: Sequence[dict[str, np.ndarray]], side: Side) -> None:
    """Outputs of all layers, where the target can give inner values."""
    records = bundle.manifest.layers
    if not records:
        side.reason = "the model has no quantized layers"
        return
    try:
        engine = target.open(bundle, values=tuple(dict.fromkeys(record.output for record in records.values())))
    except Misuse as error:
        side.reason = error.cause
        note(f"parity: layers cannot be compared: {error.cause}")
        return
    with closing(engine):
        side.layers = run(EngineRunner(bundle, target.name, engine, layers=tuple(records)), feeds)


def _torch(reference: Reference, module: Any, bundle: Bundle, layers: Sequence[str]) -> TorchRunner:
    found = reference.layers(module) if layers else {}
    missing = [name for name in layers if name not in found]
    if missing:
        raise Misuse(f"{reference.where}: has no quantized layer {missing[0]}.", "Build the bundle anew.")
    chosen = {name: found[name] for name in layers}
    return TorchRunner(reference.name, module, bundle.manifest.inputs, layers=chosen)


def _follow(
    reference: Reference, module: Any, bundle: Bundle, feeds: Sequence[dict[str, np.ndarray]], engine: RunResults
) -> RunResults:
    """What each layer should have given in the engine: PyTorch goes on from the engine's outputs of all layers before.

    Left to itself, PyTorch would drift apart from any engine: one rounding tie that falls the other way moves a code,
    which moves others in the layers behind, and after six blocks of 4-bit activations no wrong weight would be seen.
    """
    runner = _torch(reference, module, bundle, tuple(bundle.manifest.layers))
    ((_, iterations),) = engine
    outputs = []
    for feed, found in zip(feeds, iterations, strict=True):
        with runner.following({name: value for name, value in found.items() if name != OUTPUT}), runner:
            outputs.append(runner.infer(feed))
    return recorded(reference.name, outputs)


def _steps(
    problem: Problem, reference: Reference, module: Any, feeds: Sequence[Mapping[str, np.ndarray]]
) -> RunResults | None:
    """The reference's outputs for the feeds: computed, else recorded, else None."""
    if module is not None:
        return run(_torch(reference, module, problem.bundle, ()), feeds)
    if problem.trajectory_reason and reference.outputs is not None:
        note(f"parity: {reference.reason}: the recorded outputs stand for the {reference.name} model")
        return recorded(reference.name, [{OUTPUT: output} for output in reference.outputs])
    return None


def few(steps: Sequence[Step]) -> list[Step]:
    """The first, the last and what lies evenly between: LAYER_STEPS of them."""
    indices = sorted({round(index) for index in np.linspace(0, len(steps) - 1, LAYER_STEPS)})
    return [steps[index] for index in indices]


@dataclass(frozen=True)
class Walk:
    """A trajectory: latents after each step, and what the model was asked and answered at each."""

    latents: list[np.ndarray]
    feeds: list[dict[str, np.ndarray]]
    outputs: list[np.ndarray]


def _walk(problem: Problem, runner: BaseRunner) -> Walk:
    """Denoises from the problem's noise."""
    classes = problem.bundle.config["num_embeds_ada_norm"]
    ports = {port.name: port for port in problem.bundle.manifest.inputs}
    walk = Walk([], [], [])

    def denoise(latents: np.ndarray, timesteps: np.ndarray, labels: np.ndarray) -> np.ndarray:
        feed = dict(zip(_CLASS_CONDITIONAL, (latents, timesteps, labels), strict=True))
        walk.feeds.append({name: value.astype(ports[name].dtype, copy=False) for name, value in feed.items()})
        walk.outputs.append(runner.infer(walk.feeds[-1])[OUTPUT])
        return walk.outputs[-1]

    with runner:
        steps = _trajectory(problem, denoise, classes, ports["hidden_states"].shape[1:])
        walk.latents.extend(step.after for step in track(steps, f"trajectory, {runner.name}", problem.steps))
    return walk


def _trajectory(problem: Problem, denoise: Denoise, classes: int, shape: tuple) -> Iterator:
    return trajectory(
        denoise,
        scheduler=problem.scheduler,
        labels=np.arange(SAMPLES) * classes // SAMPLES,
        steps=problem.steps,
        guidance=GUIDANCE,
        noise=initial_noise(range(problem.seed, problem.seed + SAMPLES), shape),
        null_label=classes,
    )
