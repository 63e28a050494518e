"""The verdicts on what was run, as parity.json holds them: a status and the values of each check."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from polygraphy.comparator import RunResults

from dit2deploy.artefacts.bundle import Thresholds
from dit2deploy.stages.parity.compare import Fidelity, compare, measure
from dit2deploy.stages.parity.evidence import Evidence, Problem, Side
from dit2deploy.stages.parity.runners import OUTPUT

CHECKS = ("layers", "steps", "trajectory")
DIVIDED = "smoothing divides their outputs by factors that full precision does not have"


def engine_against_quantized(problem: Problem, evidence: Evidence, thresholds: Thresholds) -> dict[str, Any]:
    """Does the engine compute the model? The only checks that can fail."""
    engine, quantized = evidence.engine, evidence.quantized
    made: dict[str, Any] = dict.fromkeys(CHECKS, not_run(quantized.reason))
    if evidence.followed is not None and engine.layers is not None:
        made["layers"] = _layers(
            evidence.followed,
            engine.layers,
            threshold_db=thresholds.layer_db,
            channel_threshold_db=thresholds.channel_db,
        )
    elif engine.reason:
        made["layers"] = not_run(engine.reason)
    if quantized.steps is not None and engine.steps is not None:
        made["steps"] = _steps(quantized.steps, engine.steps, evidence.feeds, threshold_db=thresholds.step_db)
    made["trajectory"] = _trajectory(problem, quantized, engine, thresholds.trajectory_db)
    return made


def against_full_precision(problem: Problem, evidence: Evidence) -> dict[str, Any]:
    """What did quantization cost, in PyTorch and in the engine? No thresholds: that is for people to judge.

    Layers whose outputs smoothing divides are left out of "layers" and named there.
    """
    full, made = evidence.full_precision, {}
    for who, side in (("quantized", evidence.quantized), ("engine", evidence.engine)):
        reason = full.reason or side.reason or evidence.engine.reason or (DIVIDED if evidence.divided else "")
        made[who] = dict.fromkeys(CHECKS, not_run(reason))
        if full.layers is not None and side.layers is not None:
            made[who]["layers"] = _layers(full.layers, side.layers)
            if evidence.divided:
                made[who]["layers"] |= {"left_out": list(evidence.divided), "why_left_out": DIVIDED}
        if full.steps is not None and side.steps is not None:
            made[who]["steps"] = _steps(full.steps, side.steps, evidence.feeds)
        made[who]["trajectory"] = _trajectory(problem, full, side)
    return made


def nothing(reason: str, cure: str) -> dict[str, Any]:
    """All checks "not run", for a target that cannot run here."""
    return {
        "engine_against_quantized": dict.fromkeys(CHECKS, not_run(reason, cure)),
        "against_full_precision": {
            who: dict.fromkeys(CHECKS, not_run(reason, cure)) for who in ("quantized", "engine")
        },
    }


def not_run(reason: str, cure: str = "") -> dict[str, str]:
    return {"status": "not run", "reason": reason, **({"cure": cure} if cure else {})}


def overall(checks: Mapping[str, Mapping[str, Any]]) -> str:
    """Failed if one check failed; passed if at least one was made."""
    statuses = {check["status"] for check in checks.values()}
    return next((status for status in ("failed", "passed") if status in statuses), "not run")


def failure(checks: Mapping[str, Mapping[str, Any]]) -> str:
    """What failed, in words; names the first layer that diverges."""
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


def _steps(
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


def _layers(reference: RunResults, other: RunResults, **thresholds: float) -> dict[str, Any]:
    """Each layer over the steps, in execution order, and the first layer that is below its threshold."""
    worst: dict[str, Fidelity] = {}
    for values in compare(reference, other, **thresholds):
        for name in values.keys() - {OUTPUT}:
            worst[name] = worst[name].joined(values[name]) if name in worst else values[name]
    worst = {name: worst[name] for name in values if name != OUTPUT}
    first = next((name for name, fidelity in worst.items() if not fidelity), None)
    return {
        "status": _status(worst.values()),
        **thresholds,
        "first_diverging": first,
        "values": [{"layer": name, **fidelity.record()} for name, fidelity in worst.items()],
    }


def _trajectory(problem: Problem, reference: Side, other: Side, threshold_db: float | None = None) -> dict[str, Any]:
    """Latents after each step; the last ones are the images, and only they have a threshold."""
    if reference.latents is None or other.latents is None:
        return not_run(problem.trajectory_reason or reference.reason or other.reason)
    found = [measure(x, y) for x, y in zip(reference.latents, other.latents, strict=True)]
    values = [
        {"timestep": timestep, **fidelity.record()} for timestep, fidelity in zip(problem.timesteps, found, strict=True)
    ]
    passed = threshold_db is None or found[-1].sqnr_db >= threshold_db
    return {
        "status": "passed" if passed else "failed",
        **({} if threshold_db is None else {"threshold_db": threshold_db}),
        "final": found[-1].record(),
        "values": values,
    }


def _status(found: Iterable[Fidelity]) -> str:
    return "passed" if all(found) else "failed"
