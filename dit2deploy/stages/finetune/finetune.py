"""Stage finetune: trains a quantized checkpoint to answer as the full-precision model does; the policy stays."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import TensorFile, sha256_of_file, sha256_of_json, write_tensors
from dit2deploy.base.machine import versions
from dit2deploy.base.progress import note
from dit2deploy.models.load import linears_of, load_transformer, open_model, put
from dit2deploy.nn.convert import check_fits, empty_quantized
from dit2deploy.nn.train_linear import make_trainable
from dit2deploy.quantizers.permutation import permuted, with_orders
from dit2deploy.quantizers.smoothing import fold_into, gathered_channels, smoothed
from dit2deploy.stages.finetune.examples import Images, batches, pool_of
from dit2deploy.stages.finetune.selective import phases
from dit2deploy.stages.finetune.settings import Settings
from dit2deploy.stages.finetune.training import Training, packed, train

_FLOAT = LayerPolicy(weight="float")
ALGORITHM = 2  # part of the state's key: raise it when the same inputs train to another result


def finetune(
    model: Path,
    checkpoint: Checkpoint,
    out: Path,
    *,
    calibration: CalibrationSet,
    settings: Settings | None = None,
    data: Path | None = None,
    minutes: float | None = None,
    save_every: int = 100,
    seed: int = 0,
) -> Checkpoint:
    """Trains the checkpoint's codes, scales, biases and branches and writes a checkpoint of the same policy to `out`.

    `model` is the diffusers folder that the checkpoint was made of. It teaches: the loss is the squared error to its
    output (quantization-aware training as RobuQ does it, https://arxiv.org/abs/2509.23582; that a teacher gives
    the targets is our inference, methods.md 3.6) on the calibration set's calls and, for class-conditional models, on
    trajectories that it samples anew. `data`, a safetensors file of `images` float32 [N, C, H, W] in the model's
    latent space and `labels` int64 [N], adds noised images to each batch, and the loss of plain training.
    Layers that are not quantized stay as they are, and with `trained` "selective" so do those that QuEST does not
    choose (selective.py). Runs on the CPU in float32.

    `minutes` end the training earlier, with the learning rate fully decayed. A killed run goes on from `OUT.parts/`,
    which is written every `save_every` steps; on one thread the result is bit for bit that of a run that was not
    killed, unless `minutes` cut it. The manifest still tells how the checkpoint was quantized; its field `training`
    how it was trained: hashes of the inputs, settings, losses.

    Raises Misuse for a checkpoint or calibration set of another model and for data that does not fit the model;
    Failed where the loss is not finite.
    """
    model, out, settings = Path(model), Path(out), settings or Settings()
    settings.check()
    source = open_model(model)
    _check_belongs(source.sha256, model, checkpoint, calibration)
    _check_trainable(checkpoint)
    check_fits(empty_quantized(checkpoint.config, checkpoint.policy), checkpoint)
    teacher, family = load_transformer(model)
    images = None if data is None else Images.load(Path(data), source, teacher.config)
    student = _student(model, checkpoint, calibration)
    made_of = {
        "model_sha256": source.sha256,
        "checkpoint_sha256": checkpoint.sha256,
        "policy_sha256": checkpoint.policy.sha256,
        "calibration_sha256": sha256_of_file(calibration.tensors.path),
        "data_sha256": None if data is None else sha256_of_file(Path(data)),
        "settings": dataclasses.asdict(settings),
        "seed": seed,
    }
    parts = out.with_name(f"{out.name}.parts")
    pool_key = sha256_of_json(
        [source.sha256, made_of["calibration_sha256"], calibration.manifest.guidance, settings.trajectories, seed]
    )
    pool_file = parts / f"pool-{pool_key}.safetensors"
    if not pool_file.exists():
        pool = pool_of(teacher, source, calibration, trajectories=settings.trajectories, seed=seed)
        write_tensors(pool_file, pool)
    file = TensorFile(pool_file, cure=f"Remove {parts} and run again.")
    pool, calls = {name: file.read(name) for name in file}, family.conditioning != "class"

    generator = torch.Generator().manual_seed(seed)
    chosen = phases(student, teacher, family, pool, calls=calls) if settings.trained == "selective" else []
    training = Training(student, settings, generator, phases=chosen)
    drawn = batches(
        pool,
        images,
        teacher,
        calls=calls,
        batch=settings.batch,
        generator=generator,
    )
    key = sha256_of_json([ALGORITHM, made_of])
    train(training, drawn, minutes=minutes, save_every=save_every, state=parts / "state.safetensors", key=key)
    training.use_average()

    training_record = {
        **made_of,
        "steps": training.step,
        "seconds": round(training.seconds, 1),
        "losses": training.losses,
        "phases": [sorted(phase) for phase in chosen],
        "versions": versions("dit2deploy", "torch", "diffusers", "numpy"),
    }
    made = Checkpoint.save(
        out,
        checkpoint.manifest.model_copy(update={"training": training_record}),
        tensors=_Trained(checkpoint, packed(training)),
        policy=checkpoint.policy,
        config=checkpoint.config,
        scheduler_config=checkpoint.scheduler_config,
    )
    shutil.rmtree(parts, ignore_errors=True)
    return made


def _check_belongs(model_sha256: str, model: Path, checkpoint: Checkpoint, calibration: CalibrationSet) -> None:
    for where, found, verb in (
        (checkpoint.folder, checkpoint.manifest.model_sha256, "quantize"),
        (calibration.folder, calibration.manifest.model_sha256, "calibrate"),
    ):
        if found != model_sha256:
            raise Misuse(f"{where}: was made of another model than {model}.", f"Make it anew with `dit2deploy {verb}`.")
    if not any(layer.is_quantized for layer in checkpoint.policy.layers.values()):
        raise Misuse(f"{checkpoint.folder}: its policy quantizes no layer.", "There is nothing to train.")
    for name, layer in checkpoint.policy.layers.items():
        if layer.log_bits:
            raise Misuse(
                f"{checkpoint.folder}: layer {name} has Twin-Log levels, and training knows evenly spaced codes alone.",
                "Quantize with log_bits 0 for training.",
            )


def _check_trainable(checkpoint: Checkpoint) -> None:
    policy = checkpoint.policy
    if policy.has_regions or any(layer.weight_bits is not None for layer in policy.layers.values()):
        raise Misuse(
            f"{checkpoint.folder}: quantized attention, inputs of two regions and limited codes cannot be trained.",
            "Quantize by another recipe, e.g. w4a4.",
        )


def _student(model: Path, checkpoint: Checkpoint, calibration: CalibrationSet) -> torch.nn.Module:
    """The checkpoint's network, trainable, its latent weights where quantization found them: smoothing's factors and
    orders of channels, which no file holds, are gathered on the calibration set as `quantize` did. What is not
    quantized comes from the checkpoint, with its factors in it."""
    network, family = load_transformer(model)
    policy, linears = checkpoint.policy, linears_of(network)
    wanted, swaps = list(smoothed(policy, family.folds(linears))), permuted(policy, linears)
    if (wanted or swaps) and calibration.sha256 != checkpoint.manifest.calibration_sha256:
        note("finetune: smoothing was gathered on another calibration set; latent weights start less exactly")
    folded = gathered_channels(network, wanted, calibration)
    fold_into(network, with_orders(folded, network, swaps, policy, calibration))
    make_trainable(network, policy, _Layers(checkpoint), timestep_scale=family.timestep_scale)
    for name in network.state_dict():
        if not checkpoint.policy.layers.get(name.rpartition(".")[0], _FLOAT).is_quantized:
            put(network, name, torch.from_numpy(checkpoint.tensors.read(name)).float())
    return network


class _Layers(Mapping[str, Mapping[str, np.ndarray]]):
    """A checkpoint's tensors by layer and suffix, read when asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, layer: str) -> dict[str, np.ndarray]:
        suffixes = ("weight", "weight_scale", "bias", "qmax", *self._checkpoint.policy.layers[layer].branch_leaves)
        return {suffix: self._checkpoint.tensors.read(f"{layer}.{suffix}") for suffix in suffixes}

    def __iter__(self) -> Iterator[str]:
        return (name for name, layer in self._checkpoint.policy.layers.items() if layer.is_quantized)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Trained(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint in their order, those of trained layers replaced."""

    def __init__(self, checkpoint: Checkpoint, layers: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        self._tensors = checkpoint.tensors
        self._trained = {f"{name}.{suffix}": value for name, held in layers.items() for suffix, value in held.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._trained[name] if name in self._trained else self._tensors.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
