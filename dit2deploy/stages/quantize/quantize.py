"""Stage quantize: packs every linear layer as the policy says, one after the other, and goes on where it stopped."""

import copy
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dit2deploy.artefacts import unfinished
from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.checkpoint import Checkpoint, CheckpointManifest
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import TensorFile, sha256_of_json, write_tensors
from dit2deploy.base.machine import versions
from dit2deploy.base.memory import give_back
from dit2deploy.base.progress import note, report, track
from dit2deploy.models.blocks import blocks_of
from dit2deploy.models.load import ModelFolder, linears_of, load_transformer, open_model, skeleton
from dit2deploy.models.places import check_places
from dit2deploy.quantizers.fisher import fisher_scores
from dit2deploy.quantizers.linear import quantize_linear
from dit2deploy.quantizers.permutation import permuted, with_orders
from dit2deploy.quantizers.smoothing import Channels, fold_into, gathered_channels, smoothed
from dit2deploy.quantizers.temporal import effective_size, step_weights
from dit2deploy.quantizers.walk import by_block
from dit2deploy.stages.quantize import conditions
from dit2deploy.stages.quantize.block_calls import call_of
from dit2deploy.stages.quantize.hessians import gather_in_turn, passes
from dit2deploy.stages.quantize.plan import Plan, make_plan
from dit2deploy.stages.quantize.reconstruct import reconstruct, units_of
from dit2deploy.stages.quantize.regions import search_regions

REGIONS = "regions"  # the part that holds what is searched for all layers and attentions at once
ALGORITHM = 2  # part of each part's key: raise it when the same inputs give other codes


def quantize(
    model: Path,
    policy: Policy,
    calibration: CalibrationSet,
    out: Path,
    *,
    iterations: int | None = None,
    max_memory: int | None = None,
    seed: int = 0,
) -> Checkpoint:
    """Packs each linear layer of `model` as `policy` says and writes the checkpoint to the folder `out`.

    `model` is a diffusers pipeline or transformer folder. Its weights are read one tensor at a time. Where layers need
    the second moments of their inputs (GPTQ, weighted branches), smoothing or a permutation, the network runs over the
    calibration set block by block, and of its weights only as much as fits stays in memory (`max_memory`: bytes that
    the process may own; None: what the machine has free). Fisher scores and the steps of two regions take gradients,
    and hold the whole network. Smoothing and
    permutations change the layers before too, so that the network stays the same function. Layers of rounding
    "adaround" are rounded to nearest first and then reconstructed block by block, in `iterations` steps each (None: by
    the size of the model), with two copies of it in memory. Finished layers are kept in `OUT.parts/` until the
    checkpoint is whole, so a killed run goes on; a part counts only for the same layer policy, weights, calibration set
    and seed.

    Raises Misuse for a policy or calibration set of another model, for weights with NaN or inf, for smoothing,
    permutations, attentions or regions that have nowhere to go, for layers that cannot be calibrated or
    reconstructed as the policy asks, and for a ceiling of memory that cannot be kept.
    """
    model, out = Path(model), Path(out)
    source = open_model(model)
    empty = skeleton(source)
    shapes = linears_of(empty)
    policy.check_covers(source.class_name, shapes)
    check_places(empty, policy)
    if calibration.manifest.model_sha256 != source.sha256:
        raise Misuse(
            f"{calibration.folder}: was recorded on another model than {model}.",
            "Make it anew with `dit2deploy calibrate`.",
        )
    conditions.check(policy, shapes)
    units_of(policy, list(shapes), list(blocks_of(empty)))  # refuses what cannot be reconstructed
    if iterations is not None and iterations < 1:
        raise Misuse(f"quantize: {iterations} iterations reconstruct nothing.", "Give at least 1.")
    calibration_sha256 = calibration.sha256
    folds = list(smoothed(policy, source.family.folds(shapes)))
    swaps = permuted(policy, shapes)
    touched = {name: [] for name in shapes}  # what smoothing does to a layer depends on its neighbours' alpha
    for fold, layer in folds:
        producers = [producer.layer for producer in fold.producers]
        for name in (*fold.readers, *producers):
            touched[name].append([*producers, *fold.readers, layer.smoothing, layer.smoothing_steps])
    for reader, producer in swaps.items():
        for name in (reader, producer):
            touched[name].append([producer, reader, policy.layers[reader].hadamard])
    keys = {
        name: sha256_of_json(
            [ALGORITHM, name, layer.model_dump(mode="json"), source.sha256, calibration_sha256, seed, touched[name]]
            # A reconstructed layer depends on all that is quantized before it.
            + ([policy.sha256, iterations] if layer.rounding == "adaround" else [])
        )
        for name, layer in policy.layers.items()
        if layer.is_quantized
    }
    if policy.has_regions:
        keys[REGIONS] = sha256_of_json([ALGORITHM, policy.sha256, source.sha256, calibration_sha256, seed])
    names = [name for name in shapes if policy.layers[name].is_quantized]  # in the model's order
    parts = Parts(out.with_name(f"{out.name}.parts"), keys, names)
    missing = [name for name in names if name not in parts]
    walked = bool(folds or swaps) or any(policy.layers[name].needs_moments for name in missing)
    call = call_of(calibration, 0) if walked else None
    plan = make_plan(empty, shapes, policy, missing, call=call, max_memory=max_memory)
    if kept := len(names) - len(missing):
        note(f"quantize: {kept} of {len(names)} layers were done by an earlier run")
    done = kept
    report("quantize", done, len(names))
    folded = {}
    if folds or swaps:
        network = load_transformer(model, keep=plan.keep)[0]
        folded = with_orders(gathered_channels(network, folds, calibration), network, swaps, policy, calibration)
        del network  # what is gathered below opens it again, within the same ceiling
    nearest: dict[str, Mapping[str, np.ndarray]] = {}  # what is to be reconstructed
    for name, hessian in _with_hessians(missing, model, policy, shapes, calibration, plan=plan, seed=seed):
        begun = time.perf_counter()
        channels = folded.get(name, Channels())
        try:
            if hessian is not None:
                hessian = channels.apply_moments(hessian)
            weight = source.tensors.read(f"{name}.weight")
            bias = source.tensors.read(f"{name}.bias") if f"{name}.bias" in source.tensors else None
            if bias is None and channels.shift is not None:
                bias = np.zeros(len(weight), np.float32)
            tensors = quantize_linear(
                channels.apply("weight", weight),
                None if bias is None else channels.apply("bias", bias),
                policy.layers[name],
                hessian=hessian,
                seed=seed,
            )
        except ValueError as error:
            raise Misuse(f"{source.folder}: {name}.weight: {error}.", "Check the model's weights.") from error
        if policy.layers[name].rounding == "adaround":
            nearest[name] = tensors
            continue
        parts.add(name, tensors, time.perf_counter() - begun)
        done += 1
        report("quantize", done, len(names))
    if nearest:
        exact, family = load_transformer(model)
        fold_into(exact, folded)
        tensors = {name: nearest[name] if name in nearest else parts.read(name) for name in names}
        made_of = family, policy, calibration, tensors
        finished = tensors.keys() - nearest
        units = reconstruct((exact, copy.deepcopy(exact)), *made_of, done=finished, iterations=iterations, seed=seed)
        for chosen, seconds in units:
            for name in chosen:
                parts.add(name, chosen[name], seconds / len(chosen))
            done += len(chosen.keys() & nearest)
            report("quantize", done, len(names))

    if policy.has_regions and REGIONS not in parts:
        begun = time.perf_counter()
        tables = search_regions(load_transformer(model)[0], policy, calibration, seed=seed)
        parts.add(REGIONS, tables, time.perf_counter() - begun)

    made = Checkpoint.save(
        out,
        CheckpointManifest(
            model=source.class_name,
            model_sha256=source.sha256,
            model_path=str(model.resolve()),
            policy_sha256=policy.sha256,
            calibration_sha256=calibration_sha256,
            seed=seed,
            iterations=iterations,
            layer_seconds={name: parts.seconds(name) for name in names},
            versions=versions("dit2deploy", "torch", "diffusers", "numpy"),
        ),
        tensors=_Assembled(source, parts, folded),
        policy=policy,
        config=source.config,
        scheduler_config=source.scheduler_config,
    )
    parts.remove()
    return made


def _with_hessians(
    names: list[str],
    model: Path,
    policy: Policy,
    shapes: Mapping[str, tuple[int, int]],
    calibration: CalibrationSet,
    *,
    plan: Plan,
    seed: int,
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Each layer with the second moments that it needs; first those that need none, as they need no network."""
    needy = {name: shapes[name][1] for name in names if policy.layers[name].needs_moments}
    for name in names:
        if name not in needy:
            yield name, None
    if needy:
        network, family = load_transformer(model, keep=plan.keep)
        timed = [name for name in needy if policy.layers[name].hessian == "fisher"]
        weights = {}
        for run in passes({name: needy[name] for name in timed}, budget=plan.hessians):  # gradients of a few at once
            scores = _scores_by_step(network, run, calibration, seed=seed)
            weights |= {name: step_weights(values) for name, values in scores.items()}
        if weights:
            sizes = [effective_size(value) for value in weights.values()]
            note(
                f"quantize: Fisher weights of {len(calibration)} steps count as {min(sizes):.1f} to "
                f"{max(sizes):.1f} equal ones"
            )
        temporal = {name: k for name, k in needy.items() if policy.layers[name].calls == "conditions"}
        blocks = by_block(network, [name for name in needy if name not in temporal])
        runs = [run for block in blocks for run in passes({name: needy[name] for name in block}, budget=plan.hessians)]
        yield from gather_in_turn(network, runs, calibration, weights=weights)
        if temporal:
            every = conditions.Conditions(calibration, family.classes_and_shape(network.config)[0])
            runs = list(passes(temporal, budget=plan.hessians))
            yield from gather_in_turn(conditions.ConditionPart(network), runs, every)


def _scores_by_step(
    network: torch.nn.Module, names: list[str], calibration: CalibrationSet, *, seed: int
) -> dict[str, list[float]]:
    """Fisher scores of layers, one for each call of the set."""
    weights = [network.get_parameter(f"{name}.weight") for name in names]
    by_call = []
    for index in track(range(len(calibration)), "Fisher scores"):
        call = {name: torch.from_numpy(value) for name, value in calibration.call(index).items()}
        by_call.append(fisher_scores(network, weights, call, seed=seed + index))
    return {name: list(scores) for name, scores in zip(names, zip(*by_call, strict=True), strict=True)}


class Parts:
    """Finished layers on disk, one safetensors file each, under a key that says what they were made of."""

    def __init__(self, folder: Path, keys: Mapping[str, str], layers: Sequence[str]) -> None:
        self._folder = folder
        self._keys = keys
        self._layers = layers

    def __contains__(self, name: str) -> bool:
        return name in self._keys and self._path(name).exists()

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._keys[name]}.safetensors"

    def add(self, name: str, tensors: Mapping[str, np.ndarray], seconds: float) -> None:
        write_tensors(self._path(name), tensors, {"layer": name, "seconds": f"{seconds:.4f}"})
        missing, total = [layer for layer in self._layers if layer not in self], len(self._layers)
        unfinished.tell(self._folder, "quantize", "layers", done=total - len(missing), total=total, missing=missing)
        give_back()  # what the allocator keeps of a layer's arrays would grow from layer to layer

    def open(self, name: str) -> TensorFile:
        return TensorFile(self._path(name), cure=f"Remove {self._folder} and run again.")

    def read(self, name: str) -> dict[str, np.ndarray]:
        part = self.open(name)
        return {suffix: part.read(suffix) for suffix in part}

    def seconds(self, name: str) -> float:
        return float(self.open(name).metadata["seconds"])

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class _Assembled(Mapping[str, np.ndarray]):
    """The checkpoint's tensors in the model's order, each read from the model or from its part when asked for."""

    def __init__(self, source: ModelFolder, parts: Parts, folded: Mapping[str, Channels]) -> None:
        self._source, self._folded = source, folded
        # Name in the checkpoint -> where it lies: a part and the name there, or None and the name in the model.
        self._places: dict[str, tuple[TensorFile | None, str]] = {}
        for tensor in source.tensors:
            layer, _, leaf = tensor.rpartition(".")
            if layer not in parts:
                self._places[tensor] = None, tensor
            elif leaf == "weight":
                part = parts.open(layer)
                self._places |= {f"{layer}.{suffix}": (part, suffix) for suffix in part}
        if REGIONS in parts:
            part = parts.open(REGIONS)
            self._places |= {name: (part, name) for name in part}

    def __getitem__(self, name: str) -> np.ndarray:
        part, stored = self._places[name]
        if part is not None:
            return part.read(stored)
        value = self._source.tensors.read(stored)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise Misuse(f"{self._source.folder}: {name} holds NaN or inf.", "Check the model's weights.")
        layer, _, leaf = stored.rpartition(".")
        if layer in self._folded:  # left in full precision before a smoothed one
            return self._folded[layer].apply(leaf, value).astype(value.dtype)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
