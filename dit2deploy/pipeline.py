"""compile(): all stages in order. What the hashes of a stage's inputs show to be done is skipped."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dit2deploy import __version__
from dit2deploy.artefacts import unfinished
from dit2deploy.artefacts.bundle import MANIFEST as BUNDLE_MANIFEST
from dit2deploy.artefacts.bundle import PARITY, PROFILE, QUALITY, REPORT, Bundle
from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base import progress
from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.base.estimate import Estimate
from dit2deploy.base.files import sha256_of_file, sha256_of_folder, sha256_of_json, write_json
from dit2deploy.models.hub import local
from dit2deploy.models.load import ModelFolder, open_model
from dit2deploy.models.pipeline import read_prompts
from dit2deploy.sampling import is_guided

STAGES = (
    "fuse-lora",
    "calibrate",
    "search",
    "quantize",
    "export",
    "export float",
    "build",
    "parity",
    "evaluate",
    "profile",
    "report",
)


class _Journal:
    """Which stage made what from what: `stages.json` of the work folder; and how far this run of `stages` is."""

    def __init__(self, path: Path, stages: Sequence[str]) -> None:
        self.path = path
        self._left = list(stages)
        self._total = len(stages)
        try:
            self.done: dict[str, dict[str, str]] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            self.done = {}

    def run(self, stage: str, out: Path, inputs: Mapping[str, Any], work: Callable[[], Any]) -> None:
        """Does `work`, which makes `out`, unless the same inputs made what lies there."""
        key = sha256_of_json({"version": __version__, "stage": stage, **inputs})
        entry = self.done.get(stage, {})
        if entry.get("inputs") == key and out.exists() and entry.get("output") == _hash(out):
            progress.note(f"{stage}: done before, kept")
            self._left.remove(stage)
            return
        done = self._total - len(self._left)
        unfinished.tell(self.path.parent, "compile", "stages", done=done, total=self._total, missing=self._left)
        work()
        self.done[stage] = {"inputs": key, "output": _hash(out)}
        write_json(self.path, self.done)
        self._left.remove(stage)

    def end(self) -> None:
        """All stages were run: nothing is unfinished."""
        (self.path.parent / unfinished.FILE).unlink(missing_ok=True)


def _identity(model: ModelFolder) -> str:
    """Of all that stages read of a model: weights, config, scheduler."""
    return sha256_of_json([model.sha256, model.config, model.scheduler_config])


def _hash(path: Path) -> str:
    return sha256_of_file(path) if path.is_file() else sha256_of_folder(path)


def compile(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str = "w1.58a4",
    policy: str | Path | None = None,
    checkpoint: str | Path | None = None,
    targets: Sequence[str] = ("ort-cpu",),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    calibration: str | Path | None = None,
    prompts: str | Path | None = None,
    height: int | None = None,
    width: int | None = None,
    classifier: str | Path | None = None,
    work: str | Path | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    sizes: Sequence[tuple[int, int]] = (),
    samples: int = 8,
    steps: int = 20,
    guidance: float = 1.5,
    runs: int = 30,
    quality_samples: int = 200,
    max_memory: int | None = None,
    seed: int = 0,
) -> Bundle:
    """Takes a diffusers folder, or a model of the hub (OWNER/NAME or OWNER/NAME@REVISION), to a bundle with parity,
    profile and report.

    `policy` (a policy.json) takes the place of the search by `recipe`; `checkpoint` (of quantize or finetune) that of
    search and quantize; `calibration` (a calibration set) that of calibrate. `prompts`, `height`, `width` are those of
    `calibrate`: a text-conditional model without prompts is calibrated on random inputs, with a note of the cure.
    `sizes` are those of `export`, `options` those of `build`. `lora` (safetensors) is added to the weights first,
    `lora_scale` times: all that follows is that of the model with it, which lies in `work` too. Intermediate artefacts
    lie in `work` (default: OUT.work beside the bundle) and are used again. calibrate, quantize, export, build and
    parity own at most `max_memory` bytes (None: what the machine has free). Stopped at any point, the same call goes
    on. Measured is the first of `targets` that runs here. Raises Misuse for bad input and Failed where parity is below
    its thresholds; the report is written before that.
    """
    from dit2deploy.stages.build import build
    from dit2deploy.stages.calibrate import calibrate
    from dit2deploy.stages.evaluate import evaluate
    from dit2deploy.stages.export import export, export_float
    from dit2deploy.stages.fuse_lora import config_beside, fuse_lora
    from dit2deploy.stages.parity import parity
    from dit2deploy.stages.profile import profile
    from dit2deploy.stages.quantize import quantize
    from dit2deploy.stages.report import report
    from dit2deploy.stages.search import search
    from dit2deploy.targets import by_name

    model, out = local(model), Path(out)
    work = Path(work) if work else out.with_name(out.name + ".work")
    for name in targets:
        able = by_name(name).availability()
        if not able.can_build:
            raise Misuse(f"{name} cannot be built here: {able.reason}", able.cure)
        by_name(name).check((options or {}).get(name, {}))
    # The evidence is that of the first target that runs here; without one, it is made where the bundle is used.
    here = [name for name in targets if by_name(name).availability().can_run]
    target = (here or list(targets))[0]
    left_out = {
        "fuse-lora": lora is None,
        "calibrate": calibration is not None,
        "search": policy is not None or checkpoint is not None,
        "quantize": checkpoint is not None,
        "evaluate": classifier is None or not here,
        "profile": not here,
    }
    journal = _Journal(work / "stages.json", [stage for stage in STAGES if not left_out.get(stage)])
    source = open_model(model)
    if lora is not None:
        base, added, model = model, Path(lora), work / "model"
        if not added.is_file():
            raise Misuse(f"{added}: no such file.", "Give the LoRA's safetensors file.")
        parts = {"model": _identity(source), "lora": _hash(added), "scale": lora_scale}
        if (config := config_beside(added)) is not None:  # its alpha is a part of the strength
            parts["config"] = _hash(config)
        journal.run("fuse-lora", model, parts, lambda: fuse_lora(base, added, model, scale=lora_scale))
        source = open_model(model)
    made_of = _identity(source)
    if checkpoint is not None:
        if policy is not None:
            raise Misuse(
                "both a policy and a checkpoint are given.", "A checkpoint holds its policy: leave the policy out."
            )
        if Checkpoint.load(Path(checkpoint)).manifest.model_sha256 != source.sha256:
            raise Misuse(f"{checkpoint}: was not made from {model}.", "Give the model that it was quantized from.")
    sampler = {"steps": steps, "guidance": guidance, "seed": seed}
    asked = _prompts(prompts, height=height, width=width, calibration=calibration)

    calibration_set = Path(calibration) if calibration else work / "calibration"
    if calibration is None:
        journal.run(
            "calibrate",
            calibration_set,
            {"model": made_of, "samples": samples, **sampler, **_keys(asked)},
            lambda: calibrate(model, calibration_set, samples=samples, max_memory=max_memory, **sampler, **asked),
        )
    packed = Path(checkpoint) if checkpoint else work / "checkpoint"
    if checkpoint is None:
        policy_file = Path(policy) if policy else work / "policy.json"
        if policy is None:
            journal.run(
                "search",
                policy_file,
                {"model": made_of, "recipe": recipe, "calibration": _hash(calibration_set), "seed": seed},
                lambda: search(model, policy_file, recipe=recipe, calibration=calibration_set, seed=seed),
            )
        chosen = Policy.load(policy_file)
        journal.run(
            "quantize",
            packed,
            {"model": made_of, "policy": chosen.sha256, "calibration": _hash(calibration_set), "seed": seed},
            lambda: quantize(
                model, chosen, CalibrationSet.load(calibration_set), packed, max_memory=max_memory, seed=seed
            ),
        )
    fused = work / "onnx"
    journal.run(
        "export",
        fused,
        {"checkpoint": _hash(packed), **({"sizes": list(sizes)} if sizes else {})},
        lambda: export(packed, fused, form="fused", sizes=sizes, max_memory=max_memory),
    )
    baseline = work / "onnx-float"
    journal.run(
        "export float", baseline, {"model": made_of}, lambda: export_float(model, baseline, max_memory=max_memory)
    )

    made_from = {
        "onnx": _hash(fused),
        "baseline": _hash(baseline),
        "calibration": _hash(calibration_set),
        "targets": list(targets),
        "options": options or {},
    }
    journal.run(
        "build",
        out / BUNDLE_MANIFEST,
        made_from,
        lambda: build(
            fused,
            out,
            targets=targets,
            options=options or {},
            calibration=calibration_set,
            model=model,
            float_onnx=baseline,
            max_memory=max_memory,
        ),
    )
    Bundle.load(out)  # a file that was changed since is an error, not a reason to build on
    bundle_hash = {"bundle": _hash(out / BUNDLE_MANIFEST)}
    failure: Failed | None = None
    try:
        journal.run(
            "parity",
            out / PARITY,
            {**bundle_hash, "target": target, "steps": steps, "seed": seed},
            lambda: parity(
                out, target=target, model=model, checkpoint=packed, steps=steps, max_memory=max_memory, seed=seed
            ),
        )
    except Failed as error:
        failure = error
    if not here:
        progress.note(f"no target of {', '.join(targets)} runs here: profile the bundle on its own device")
    if classifier is not None and here:
        judge = Path(classifier)
        journal.run(
            "evaluate",
            out / QUALITY,
            {**bundle_hash, **sampler, "target": target, "samples": quality_samples, "classifier": _hash(judge)},
            lambda: evaluate(out, target=target, classifier=judge, samples=quality_samples, **sampler),
        )
    if here:
        measured = {**bundle_hash, "target": target, "runs": runs}
        journal.run("profile", out / PROFILE, measured, lambda: profile(out, target=target, runs=runs))
    evidence = {name: _hash(out / name) for name in (PARITY, PROFILE, QUALITY) if (out / name).exists()}
    drawn = {**bundle_hash, **evidence, "target": target}
    journal.run("report", out / REPORT, drawn, lambda: report(out, target=target))
    journal.end()
    if failure is not None:
        raise failure
    return Bundle.load(out)


def _prompts(prompts: str | Path | None, *, calibration: str | Path | None, **size: int | None) -> dict[str, Any]:
    """What calibrate is told of prompts: nothing where there are none."""
    given = {name: value for name, value in {"prompts": prompts, **size}.items() if value is not None}
    if not given:
        return {}
    if calibration is not None or prompts is None:
        fault = "both prompts and a calibration set are given" if calibration is not None else "a size is given"
        raise Misuse(f"compile: {fault}.", "Sizes are those of --prompts, which a new calibration set is made of.")
    return {**given, "prompts": Path(prompts)}


def _keys(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What of it decides about the set: the prompts themselves, not where they lie."""
    return {**asked, "prompts": list(read_prompts(asked["prompts"]))} if asked else {}


def estimate(
    model: str | Path,
    *,
    recipe: str = "w1.58a4",
    policy: str | Path | None = None,
    checkpoint: str | Path | None = None,
    calibration: str | Path | None = None,
    prompts: str | Path | None = None,
    height: int | None = None,
    width: int | None = None,
    samples: int = 8,
    steps: int = 20,
    guidance: float = 1.5,
    max_memory: int | None = None,
    seed: int = 0,
) -> list[Estimate]:
    """What the long stages of `compile` will take with the same arguments: calibrate and quantize. Writes nothing.

    Raises Misuse as they do, a ceiling of memory that cannot be kept included. A recipe that measures needs a
    calibration set, so that without one quantize is left out, with a note.
    """
    from dit2deploy.models.load import skeleton
    from dit2deploy.stages import calibrate, quantize
    from dit2deploy.stages.search import is_measured, search

    model, found = local(model), []
    if calibration is None:
        sampler = {"samples": samples, "steps": steps, "guidance": guidance}
        asked = _prompts(prompts, height=height, width=width, calibration=calibration)
        samples = len(_keys(asked).get("prompts", ())) or samples
        sampler |= asked
        found.append(calibrate.estimate(model, **sampler, max_memory=max_memory))
    if checkpoint is not None:
        return found
    if policy is None and is_measured(recipe):
        progress.note(f"recipe {recipe} measures: search and quantize are not estimated before")
        return found
    with TemporaryDirectory(prefix="dit2deploy-") as folder:
        chosen = (
            Policy.load(Path(policy)) if policy else search(model, Path(folder) / "p.json", recipe=recipe, seed=seed)
        )
    if calibration is not None:
        held = CalibrationSet.load(Path(calibration))
        call, calls = held.call(0), len(held)
    else:
        source = open_model(model)
        batch = 2 * samples if is_guided(guidance) and source.family.conditioning == "class" else samples
        inputs = source.family.inputs(skeleton(source).config, batch=batch, seed=seed)
        call, calls = {name: tensor.numpy() for name, tensor in inputs.items()}, steps
    found.append(quantize.estimate(model, chosen, call, calls=calls, max_memory=max_memory, seed=seed))
    return found
