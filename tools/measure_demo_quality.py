"""Samples the demo model in full precision and writes how well its digits are read and how far they are from real."""

import argparse
import datetime
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image
from train_classifier import HELD_OUT, split
from train_demo import CLASSES, digits, place, random_shifts

from dit2deploy.base.files import sha256_of_file, write_json
from dit2deploy.base.machine import cores, cpu_model, versions
from dit2deploy.evaluate import Classifier
from dit2deploy.sampling import Scheduler, initial_noise, trajectory

BATCH = 50

EXAMPLE = """example:
  python tools/measure_demo_quality.py --guidance 1.0 1.5 2.0

The picture shows the samples of the first guidance given."""


def draw(model, scheduler: Scheduler, options: argparse.Namespace, guidance: float) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [count, 1, 16, 16] and their labels, 0..9 in turn; image i has the seed options.seed + i."""

    @torch.inference_mode()
    def denoise(latents, timesteps, labels):
        arguments = (torch.from_numpy(value) for value in (latents, timesteps, labels))
        return model(*arguments).sample.numpy()

    labels = np.arange(options.count) % CLASSES
    images = []
    for at in range(0, options.count, BATCH):
        wanted = labels[at : at + BATCH]
        noise = initial_noise(range(options.seed + at, options.seed + at + len(wanted)), (1, 16, 16))
        for step in trajectory(
            denoise,
            scheduler=scheduler,
            labels=wanted,
            steps=options.steps,
            guidance=guidance,
            noise=noise,
            null_label=CLASSES,
        ):
            last = step
        images.append(last.after)
    return np.concatenate(images), labels


def write_grid(path: Path, images: np.ndarray) -> None:
    """The first 100 images as dark ink on paper, ten a row, each pixel four times as large."""
    count = len(images) // CLASSES * CLASSES
    tiles = images[: min(count, 100), 0].reshape(-1, CLASSES, 16, 16).transpose(0, 2, 1, 3)
    grey = np.rint((1 - np.clip(tiles, -1, 1)) * 127.5).astype(np.uint8)
    sheet = Image.fromarray(grey.reshape(-1, CLASSES * 16))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 4, sheet.height * 4), Image.Resampling.NEAREST).save(path, optimize=True)


def floor(reader: Classifier, seed: int) -> dict:
    """The same measures of the real digits that the reader has not seen: what a perfect model would reach."""
    images, labels = digits()
    _, held_out = split(int(reader.metadata["seed"]))
    shifts = random_shifts(HELD_OUT, torch.Generator().manual_seed(seed))
    placed = place(images[held_out], shifts).numpy()
    return {
        "count": HELD_OUT,
        "accuracy": round(reader.class_accuracy(placed, labels[held_out].numpy()), 4),
        "fd": round(reader.distance_to_real(placed), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("dit2deploy/demo"), help="pipeline folder")
    parser.add_argument("--count", type=int, default=500, help="images (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5], help="one or more (default 1.5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default 0)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("tools/results"), help="folder of the two files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = DiTTransformer2DModel.from_pretrained(options.model / "transformer", torch_dtype=torch.float32).eval()
    scheduler = Scheduler.load(options.model)
    reader = Classifier.load(options.model / "classifier.safetensors")
    runs = []
    for guidance in options.guidance:
        begun = time.monotonic()
        images, labels = draw(model, scheduler, options, guidance)
        if not runs:
            write_grid(options.out / "demo_samples.png", images)
        runs.append(
            {
                "guidance": guidance,
                "accuracy": round(reader.class_accuracy(images, labels), 4),
                "fd": round(reader.distance_to_real(images), 4),
                "seconds": round(time.monotonic() - begun, 1),
            }
        )
        print(runs[-1], flush=True)

    write_json(
        options.out / "demo_quality.json",
        {
            "what": "accuracy and Fréchet distance (classifier features) of the demo model in float32",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": {"cpu": cpu_model(), "cores": cores(), "threads": options.threads},
            "versions": versions("torch", "diffusers", "numpy", "scikit-learn"),
            "command": shlex.join(["python", *sys.argv]),
            "model_sha256": sha256_of_file(options.model / "transformer" / "diffusion_pytorch_model.safetensors"),
            "classifier_sha256": sha256_of_file(options.model / "classifier.safetensors"),
            "count": options.count,
            "steps": options.steps,
            "seed": options.seed,
            "runs": runs,
            "real_held_out": floor(reader, options.seed),
        },
    )


if __name__ == "__main__":
    main()
