"""The parity of one engine: layer by layer, timestep by timestep, and over a whole trajectory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import RunResults

from dit2deploy.artefacts.bundle import PARITY, Bundle
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.base.progress import note, track
from dit2deploy.sampling import Denoise, Scheduler, initial_noise, trajectory
from dit2deploy.stages.parity.compare import Fidelity, compare, measure, recorded, run
from dit2deploy.stages.parity.references import Reference, References, find
from dit2deploy.stages.parity.runners import OUTPUT, EngineRunner, TorchRunner
from dit2deploy.targets import Target, by_name

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
    recorded: bool  # the feeds are the recorded steps of the bundle


def parity(
    bundle: Path,
    *,
    target: str = "ort-cpu",
    model: Path | None = None,
    checkpoint: Path | None = None,
    steps: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the engine with the quantized PyTorch model (does it compute the model?), and both with full precision
    (what did quantization cost?); writes parity.json and gives its content back.

    Only the first question has thresholds, those of the bundle's manifest. Values: SQNR in dB, largest absolute
    difference, cosine. Checks that cannot be made here are "not run", with the reason. Raises Misuse for a bundle
    without this target or sources that do not fit, and, after writing, Failed where something is below its threshold;
    its message names the first layer in execution order that is.
    """
    opened = Bundle.load(Path(bundle))
    opened.target(target)
    chosen = by_name(target)
    references = find(opened, model=model, checkpoint=checkpoint)
    able = chosen.availability()
    if able.can_run:
        problem = _problem(opened, references, steps, seed)
        values = _measure(problem, chosen, references)
    else:
        reason = f"{target} cannot run here: {able.reason}"
        note(f"parity: {reason}")
        values = _nothing(reason, able.cure)
    values["status"] = _overall(values["engine_against_quantized"])
    result = write_results(
        opened.folder / PARITY,
        "parity",
        {
            "target": target,
            "steps": steps,
            "samples": SAMPLES,
            "guidance": GUIDANCE,
            "seed": seed,
            "thresholds": opened.manifest.thresholds.model_dump(),
            "references": {
                reference.name: reference.where or f"recorded outputs ({reference.reason})"
                if reference.load or reference.outputs is not None
                else f"none: {reference.reason}"
                for reference in (references.quantized, references.full_precision)
            },
            **values,
        },
    )
    if result["status"] == "failed":
        raise Failed(f"{opened.folder}: {_failure(result)}", f"Read {opened.folder / PARITY}; build the bundle anew.")
    return result


def _problem(bundle: Bundle, references: References, steps: int, seed: int) -> Problem:
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
    feeds = references.feeds if reason else []
    return Problem(bundle, feeds, steps, seed, reason, recorded=bool(reason))


def _measure(problem: Problem, target: Target, references: References) -> dict[str, Any]:
    bundle, thresholds = problem.bundle, problem.bundle.manifest.thresholds
    paths: dict[str, list[np.ndarray]] = {}  # latents after each step, by who denoised
    feeds = problem.feeds
    quantized = references.quantized.load() if references.quantized.load else None
    if problem.trajectory_reason:
        quantized_steps = _steps(problem, references.quantized, quantized, feeds)
    else:
        walk = _walk(problem, _torch(references.quantized, quantized, bundle, ()))
        paths["quantized"], feeds = walk.latents, walk.feeds
        quantized_steps = recorded(references.quantized.name, [{OUTPUT: output} for output in walk.outputs])
    with closing(target.open(bundle)) as engine:
        runner = EngineRunner(bundle, target.name, engine)
        if paths:
            paths["engine"] = _walk(problem, runner).latents
        engine_steps = run(runner, feeds)
    own = {
        "layers": _not_run(references.quantized.reason),
        "steps": _not_run(references.quantized.reason),
        "trajectory": _not_run(problem.trajectory_reason),
    }
    cost = {who: {name: _not_run(references.full_precision.reason) for name in own} for who in ("quantized", "engine")}
    if quantized_steps is not None:
        own["steps"] = _step_values(quantized_steps, engine_steps, feeds, threshold_db=thresholds.step_db)
    if paths:
        own["trajectory"] = _trajectory_values(problem, paths["quantized"], paths["engine"], thresholds.trajectory_db)
    few = _few(feeds)
    layers = tuple(bundle.manifest.layers)
    if quantized is not None:
        values = tuple(dict.fromkeys(record.output for record in bundle.manifest.layers.values()))
        with closing(target.open(bundle, values=values)) as engine:
            layers_of_engine = run(EngineRunner(bundle, target.name, engine, layers=layers), few)
        own["layers"] = _layer_values(
            compare(
                _follow(references.quantized, quantized, bundle, few, layers_of_engine),
                layers_of_engine,
                threshold_db=thresholds.layer_db,
                channel_threshold_db=thresholds.channel_db,
            ),
            layers,
        )
        if references.full_precision.load:
            layers_of_quantized = run(_torch(references.quantized, quantized, bundle, layers), few)
    quantized = None  # models may be large: one at a time

    full = references.full_precision.load() if references.full_precision.load else None
    full_steps = _steps(problem, references.full_precision, full, feeds)
    if full_steps is not None:
        cost["engine"]["steps"] = _step_values(full_steps, engine_steps, feeds)
        if quantized_steps is not None:
            cost["quantized"]["steps"] = _step_values(full_steps, quantized_steps, feeds)
    if full is not None and paths:
        paths["full"] = _walk(problem, _torch(references.full_precision, full, bundle, ())).latents
        for who in ("quantized", "engine"):
            cost[who]["trajectory"] = _trajectory_values(problem, paths["full"], paths[who])
    if full is not None and own["layers"]["status"] != "not run":
        exact = run(_torch(references.full_precision, full, bundle, layers), few)
        cost["quantized"]["layers"] = _layer_values(compare(exact, layers_of_quantized), layers)
        cost["engine"]["layers"] = _layer_values(compare(exact, layers_of_engine), layers)
    return {"engine_against_quantized": own, "against_full_precision": cost}


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
    if problem.recorded and reference.outputs is not None:
        note(f"parity: {reference.reason}: the recorded outputs stand for the {reference.name} model")
        return recorded(reference.name, [{OUTPUT: output} for output in reference.outputs])
    return None


def _few(feeds: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    indices = sorted({round(index) for index in np.linspace(0, len(feeds) - 1, LAYER_STEPS)})
    return [feeds[index] for index in indices]


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
        scheduler=Scheduler.from_config(problem.bundle.scheduler_config),
        labels=np.arange(SAMPLES) * classes // SAMPLES,
        steps=problem.steps,
        guidance=GUIDANCE,
        noise=initial_noise(range(problem.seed, problem.seed + SAMPLES), shape),
        null_label=classes,
    )


def _step_values(
    reference: RunResults, other: RunResults, feeds: Sequence[Mapping[str, np.ndarray]], **thresholds: float
) -> dict[str, Any]:
    found = [values[OUTPUT] for values in compare(reference, other, **thresholds)]
    return {
        "status": _status(found),
        **thresholds,
        "values": [
            {"timestep": float(np.ravel(feed["timestep"])[0]), **fidelity.record()}
            for feed, fidelity in zip(feeds, found, strict=True)
        ],
    }


def _layer_values(found: Sequence[Mapping[str, Fidelity]], layers: Sequence[str]) -> dict[str, Any]:
    """The worst over the steps of each layer, in execution order, and the first layer that is below its threshold."""
    worst: dict[str, Fidelity] = {}
    for values in found:
        for name in layers:
            worst[name] = worst[name].worse(values[name]) if name in worst else values[name]
    first = next((name for name, fidelity in worst.items() if not fidelity), None)
    some = next(iter(worst.values()))
    thresholds = {"threshold_db": some.threshold_db, "channel_threshold_db": some.channel_threshold_db}
    return {
        "status": _status(worst.values()),
        **{name: value for name, value in thresholds.items() if value is not None},
        "first_diverging": first,
        "values": [{"layer": name, **fidelity.record()} for name, fidelity in worst.items()],
    }


def _trajectory_values(
    problem: Problem, reference: list[np.ndarray], other: list[np.ndarray], threshold_db: float | None = None
) -> dict[str, Any]:
    """Latents after each step; the last ones are the images, and only they have a threshold."""
    timesteps = Scheduler.from_config(problem.bundle.scheduler_config).timesteps(problem.steps).tolist()
    found = [measure(x, y) for x, y in zip(reference, other, strict=True)]
    passed = threshold_db is None or found[-1].sqnr_db >= threshold_db
    return {
        "status": "passed" if passed else "failed",
        **({} if threshold_db is None else {"threshold_db": threshold_db}),
        "final": found[-1].record(),
        "values": [
            {"timestep": timestep, **fidelity.record()} for timestep, fidelity in zip(timesteps, found, strict=True)
        ],
    }


def _status(found: Any) -> str:
    return "passed" if all(found) else "failed"


def _not_run(reason: str, cure: str = "") -> dict[str, str]:
    return {"status": "not run", "reason": reason, **({"cure": cure} if cure else {})}


def _nothing(reason: str, cure: str) -> dict[str, Any]:
    checks = ("layers", "steps", "trajectory")
    return {
        "engine_against_quantized": {name: _not_run(reason, cure) for name in checks},
        "against_full_precision": {
            who: {name: _not_run(reason, cure) for name in checks} for who in ("quantized", "engine")
        },
    }


def _overall(checks: Mapping[str, Mapping[str, Any]]) -> str:
    """Failed if one check failed; passed if at least one was made."""
    statuses = {check["status"] for check in checks.values()}
    return next((status for status in ("failed", "passed") if status in statuses), "not run")


def _failure(result: Mapping[str, Any]) -> str:
    checks = result["engine_against_quantized"]
    layers, steps, whole = checks["layers"], checks["steps"], checks["trajectory"]
    said = []
    if layers["status"] == "failed":
        name = layers["first_diverging"]
        worst = next(value for value in layers["values"] if value["layer"] == name)
        said.append(
            f"layer {name} is the first that diverges from the quantized model (SQNR {worst['sqnr_db']:.1f} dB, worst "
            f"channel {worst['worst_channel_db']:.1f} dB; {layers['threshold_db']:g} and "
            f"{layers['channel_threshold_db']:g} dB are asked for)"
        )
    if steps["status"] == "failed":
        worst = min(steps["values"], key=lambda value: value["sqnr_db"])
        said.append(
            f"at timestep {worst['timestep']:g} the engine's output has SQNR {worst['sqnr_db']:.1f} dB against the "
            f"quantized model ({steps['threshold_db']:g} dB is asked for)"
        )
    if whole["status"] == "failed":
        said.append(
            f"the trajectory ends at SQNR {whole['final']['sqnr_db']:.1f} dB against the quantized model's "
            f"({whole['threshold_db']:g} dB is asked for)"
        )
    return "; ".join(said) + "."
