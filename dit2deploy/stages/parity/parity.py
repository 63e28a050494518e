"""The parity of one engine: layer by layer, timestep by timestep, and over a whole trajectory."""

from pathlib import Path
from typing import Any

from dit2deploy.artefacts.bundle import PARITY, Bundle
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.base.files import read_json
from dit2deploy.base.progress import note
from dit2deploy.stages.parity import checks, interchange
from dit2deploy.stages.parity.evidence import GUIDANCE, SAMPLES, gather, problem_of
from dit2deploy.stages.parity.references import Reference, find
from dit2deploy.targets import by_name


def parity(
    bundle: Path,
    *,
    target: str = "ort-cpu",
    model: Path | None = None,
    checkpoint: Path | None = None,
    steps: int = 20,
    max_memory: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the engine with the quantized PyTorch model (does it compute the model?), and both with full precision
    (what did quantization cost?); writes parity.json and gives its content back. It holds the target asked for last.
    A few of the inputs and outputs lie in parity/ as Polygraphy's files.

    Only the first question has thresholds, those that the bundle's manifest has for the target. Values: SQNR in dB,
    largest absolute difference, cosine. PyTorch's models need not fit in memory: of `max_memory` bytes that the process
    may own (None: of what the machine has free) a half holds weights, and layers beyond read theirs at each call.
    Checks that cannot be made here are "not run", with the reason. Raises Misuse for a bundle without this target, for
    sources that do not fit, and for a target that cannot run here where parity.json already holds one that did; and,
    after writing, Failed where something is below its threshold: its message names the first layer in execution order
    that is.
    """
    opened = Bundle.load(Path(bundle))
    opened.target(target)
    chosen = by_name(target)
    references = find(opened, model=model, checkpoint=checkpoint, max_memory=max_memory)
    able = chosen.availability()
    if able.can_run:
        problem = problem_of(opened, references, steps=steps, seed=seed)
        evidence = gather(problem, chosen, references)
        interchange.write(opened.folder / interchange.FOLDER, evidence)
        values = {
            "engine_against_quantized": checks.engine_against_quantized(problem, evidence, opened.thresholds(target)),
            "against_full_precision": checks.against_full_precision(problem, evidence),
        }
    else:
        reason = f"{target} cannot run here: {able.reason}"
        if _measured(opened):
            raise Misuse(f"parity: {reason}", f"{able.cure} {opened.folder / PARITY} keeps what was measured before.")
        note(f"parity: {reason}")
        values = checks.nothing(reason, able.cure)
    status = checks.overall(values["engine_against_quantized"])
    result = write_results(
        opened.folder / PARITY,
        "parity",
        {
            "target": target,
            "status": status,
            "steps": steps,
            "samples": SAMPLES,
            "guidance": GUIDANCE,
            "seed": seed,
            "thresholds": opened.thresholds(target).model_dump(),
            "references": {
                reference.name: _told(reference) for reference in (references.quantized, references.full_precision)
            },
            **values,
        },
    )
    if status == "failed":
        cause = checks.failure(result["engine_against_quantized"])
        raise Failed(f"{opened.folder}: {cause}", f"Read {opened.folder / PARITY}; build the bundle anew.")
    return result


def _measured(bundle: Bundle) -> bool:
    """Whether parity.json holds results that "not run" must not take the place of."""
    path = bundle.folder / PARITY
    return path.exists() and read_json(path, cure=f"Remove {path}.").get("status") in ("passed", "failed")


def _told(reference: Reference) -> str:
    if reference.load:
        return reference.where
    return f"none: {reference.reason}" if reference.outputs is None else f"recorded outputs ({reference.reason})"
