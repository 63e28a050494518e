"""One cell of the methods table: quantize as a row says, draw, and measure against full precision."""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from methods.cases import Case, Row, block_linears

from dit2deploy.artefacts.checkpoint import TENSORS
from dit2deploy.evaluate import Classifier, psnr_db, sqnr_db
from dit2deploy.evaluate.size import average_activation_bits, effective_weight_bits
from dit2deploy.evaluate.spectrum import high_frequency_error
from dit2deploy.nn.convert import load_quantized, quantized_linears
from dit2deploy.nn.quant_linear import QuantLinear
from dit2deploy.ops.hadamard_quantize import SMALLEST, gaussian_step, hadamard, rows_of
from dit2deploy.ops.unpack import unpack
from dit2deploy.quantizers.branches import add_branches
from dit2deploy.quantizers.round_to_nearest import dequantize
from dit2deploy.sampling import Scheduler, initial_noise, trajectory
from dit2deploy.stages.finetune import finetune
from dit2deploy.stages.quantize import quantize

ITERATIONS = 200  # of reconstruction, a block (20,000 in PTQ4DiT)
KEPT = 10  # samples whose calls the quantized model is asked as full precision was

# What a cell holds, in the order of the document: key, title, digits.
QUALITY = (
    ("sqnr_db", "SQNR of the final image, dB", 1),
    ("step_sqnr_db", "SQNR of the model's output on the trajectory of full precision, mean over steps, dB", 1),
    ("psnr_db", "PSNR of the final image, dB", 1),
    ("accuracy", "class accuracy", 3),
    ("fd", "FD to real digits", 2),
    ("high_frequency_error", "error of the top quarter of spatial frequencies, share of their energy", 2),
)
COST = (
    ("weight_bits", "bits a weight, scales and branch included", 2),
    ("activation_bits", "bits an activation", 2),
    ("megabytes", "MB of the checkpoint", 2),
    ("seconds", "seconds to calibrate and quantize", 1),
)


class Drawn(NamedTuple):
    """Images float32 [N, C, H, W] and, for the first KEPT samples, each step's call and its output."""

    images: np.ndarray
    calls: list[tuple[tuple[np.ndarray, ...], np.ndarray]]


def draw(network: torch.nn.Module, scheduler: Scheduler, options: argparse.Namespace, seed: int) -> Drawn:
    """Images of seeds seed * samples .. , labels in turn."""
    config, calls = network.config, []
    labels = np.arange(options.samples) % config["num_embeds_ada_norm"]
    first = np.arange(min(KEPT, options.samples))

    def denoise(*values: np.ndarray) -> np.ndarray:
        output = ask(network, values)
        rows = np.concatenate([first + half for half in range(0, len(output), options.samples)])
        calls.append((tuple(value[rows] for value in values), output[rows]))
        return output

    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    noise = initial_noise(range(seed * options.samples, (seed + 1) * options.samples), shape)
    for step in trajectory(
        denoise,
        scheduler=scheduler,
        labels=labels,
        steps=options.steps,
        guidance=options.guidance,
        noise=noise,
        null_label=config["num_embeds_ada_norm"],
    ):
        last = step.after
    return Drawn(np.clip(last, -1, 1), calls)


def ask(network: torch.nn.Module, values: Sequence[np.ndarray]) -> np.ndarray:
    names = ("hidden_states", "timestep", "class_labels")
    with torch.inference_mode():
        inputs = {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
        return network(**inputs, return_dict=False)[0].numpy()


def quicken(network: torch.nn.Module) -> torch.nn.Module:
    """The same network with weights unpacked once, rotations as products, and one quantized input for q, k and v.

    For speed: it differs from the reference by the rounding of floats alone. Layers whose inputs are quantized to two
    regions, and attentions, stay as they are.
    """
    memory: dict[str, Any] = {}
    for layer in quantized_linears(network).values():
        if layer.policy.regions == "token":
            layer.forward = partial(_quick, layer, _dequantized(layer), _rotation(layer), memory)
    return network


def _dequantized(layer: QuantLinear) -> torch.Tensor:
    """float32 [N, K], of the rotated space."""
    return dequantize(unpack(layer.weight, layer.format, layer.in_features).float(), layer.weight_scale)


def _rotation(layer: QuantLinear) -> torch.Tensor:
    return hadamard(torch.eye(layer.policy.hadamard), block=layer.policy.hadamard)


def _quick(
    layer: QuantLinear, weight: torch.Tensor, rotation: torch.Tensor, memory: dict[str, Any], x: torch.Tensor
) -> torch.Tensor:
    policy, qmax = layer.policy, layer.groups.qmax(layer.qmax)
    how = policy.hadamard, policy.clip, policy.grid
    if memory.get("x") is not x or memory["how"] != how or not torch.equal(memory["qmax"], qmax):
        largest = rows_of(qmax, x)
        rotated = (x.reshape(-1, policy.hadamard) @ rotation).reshape(x.shape) if policy.hadamard > 1 else x
        if policy.clip == "gaussian":
            rms = torch.linalg.vector_norm(rotated, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            step = rms * gaussian_step(largest, policy.grid)
        else:
            step = rotated.abs().amax(-1, keepdim=True) / largest
        scaled = rotated / step.clamp_min(SMALLEST)
        codes = scaled.mul_(0.5).floor_().mul_(2).add_(1) if policy.grid == "mid-rise" else scaled.round_()
        memory.update(x=x, how=how, qmax=qmax, value=codes.clamp_(-largest, largest).mul_(step))
    y = torch.nn.functional.linear(memory["value"], weight, layer.bias)
    return add_branches(y, x, {leaf: getattr(layer, leaf).float() for leaf in policy.branch_leaves})


def measure(
    row: Row, case: Case, reference: Drawn, judge: Classifier, scheduler: Scheduler, options: argparse.Namespace
) -> dict[str, float]:
    """One cell at one seed: the values of QUALITY and COST."""
    begun = time.monotonic()
    policy = row.make(case)
    made = case.folder / "checkpoint"
    checkpoint = quantize(case.model, policy, case.calibration, made, iterations=ITERATIONS, seed=case.seed)
    if row.training:
        trained = case.folder / "trained"
        checkpoint = finetune(
            case.model, checkpoint, trained, calibration=case.calibration, settings=row.training, seed=case.seed
        )
    seconds = time.monotonic() - begun
    network = quicken(load_quantized(checkpoint))
    found = draw(network, scheduler, options, case.seed)
    asked = [sqnr_db(exact, ask(network, values)) for values, exact in reference.calls]
    blocks = block_linears(case.model)
    return {
        "sqnr_db": sqnr_db(reference.images, found.images),
        "step_sqnr_db": float(np.mean(asked)),
        "psnr_db": psnr_db(reference.images, found.images, data_range=2),
        "high_frequency_error": high_frequency_error(reference.images, found.images),
        **judged(judge, found.images, network.config["num_embeds_ada_norm"]),
        "weight_bits": effective_weight_bits(policy, blocks),
        "activation_bits": average_activation_bits(policy, blocks, scheduler.timesteps(options.steps).tolist()),
        "megabytes": (checkpoint.folder / TENSORS).stat().st_size / 1e6,
        "seconds": seconds,
    }


def judged(judge: Classifier, images: np.ndarray, classes: int) -> dict[str, float]:
    return {
        "accuracy": judge.class_accuracy(images, np.arange(len(images)) % classes),
        "fd": judge.distance_to_real(images),
    }
