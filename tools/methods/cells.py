"""One cell of the methods table: quantize as a row says, draw, and measure against full precision."""

import argparse
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from methods.cases import Case, Row, block_linears

from dit2deploy.artefacts.checkpoint import TENSORS
from dit2deploy.evaluate import Classifier, psnr_db, sqnr_db
from dit2deploy.evaluate.size import average_activation_bits, effective_weight_bits
from dit2deploy.evaluate.spectrum import high_frequency_error
from dit2deploy.nn.convert import load_quantized, use_kernels
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
    ("fd", "FD to real pictures", 2),
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
    network = use_kernels(load_quantized(checkpoint))
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
