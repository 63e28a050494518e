"""Samples a small DiT in full precision and writes how well its pictures are read and how far they are from real."""

import argparse
import datetime
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from pictures import HELD_OUT, PICTURES, Pictures
from PIL import Image

from dit2deploy.base.files import sha256_of_file, write_json
from dit2deploy.base.machine import cores, cpu_model, versions
from dit2deploy.evaluate import Classifier
from dit2deploy.sampling import Scheduler, initial_noise, trajectory

BATCH = 50

EXAMPLE = """example:
  python tools/measure_quality.py digits --model dit2deploy/demo --guidance 1.0 1.5 2.0

The picture shows the samples of the first guidance given."""


def draw(model, scheduler: Scheduler, options: argparse.Namespace, guidance: float) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [count, C, H, W] and their labels in turn; image i has the seed options.seed + i."""

    @torch.inference_mode()
    def denoise(latents, timesteps, labels):
        arguments = (torch.from_numpy(value) for value in (latents, timesteps, labels))
        return model(*arguments).sample.numpy()

    config = model.config
    classes = config.num_embeds_ada_norm
    shape = config.in_channels, config.sample_size, config.sample_size
    labels = np.arange(options.count) % classes
    images = []
    for at in range(0, options.count, BATCH):
        wanted = labels[at : at + BATCH]
        noise = initial_noise(range(options.seed + at, options.seed + at + len(wanted)), shape)
        for step in trajectory(
            denoise,
            scheduler=scheduler,
            labels=wanted,
            steps=options.steps,
            guidance=guidance,
            noise=noise,
            null_label=classes,
        ):
            last = step
        images.append(last.after)
    return np.concatenate(images), labels


def write_grid(path: Path, images: np.ndarray, across: int) -> None:
    """The first rows of `across` images, about a hundred in all, each pixel four times as large; one channel as ink."""
    rows = min(len(images), max(100, 2 * across)) // across
    tiles = np.clip(images[: rows * across], -1, 1)
    tiles = -tiles.repeat(3, axis=1) if tiles.shape[1] == 1 else tiles
    size = tiles.shape[-1]
    tiles = tiles.reshape(rows, across, 3, size, size).transpose(0, 3, 1, 4, 2)
    sheet = Image.fromarray(np.rint((tiles + 1) * 127.5).astype(np.uint8).reshape(rows * size, across * size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 4, sheet.height * 4), Image.Resampling.NEAREST).save(path, optimize=True)


def floor(reader: Classifier, pictures: Pictures, seed: int) -> dict:
    """The same measures of real pictures that the reader has not seen: what a perfect model would reach."""
    images, labels = pictures.held_out(HELD_OUT, seed)
    return {
        "count": HELD_OUT,
        "accuracy": round(reader.class_accuracy(images.numpy(), labels.numpy()), 4),
        "fd": round(reader.distance_to_real(images.numpy()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", choices=sorted(PICTURES), help="what it learned to draw")
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder, with classifier.safetensors")
    parser.add_argument("--count", type=int, default=500, help="images (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5], help="one or more (default 1.5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default 0)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tools/results"),
        help="folder of PICTURES_quality.json and PICTURES_samples.png",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pictures = PICTURES[options.pictures]
    model = DiTTransformer2DModel.from_pretrained(options.model / "transformer", torch_dtype=torch.float32).eval()
    scheduler = Scheduler.load(options.model)
    reader = Classifier.load(options.model / "classifier.safetensors")
    runs = []
    for guidance in options.guidance:
        begun = time.monotonic()
        images, labels = draw(model, scheduler, options, guidance)
        if not runs:
            write_grid(options.out / f"{options.pictures}_samples.png", images, min(len(pictures.names), 12))
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
        options.out / f"{options.pictures}_quality.json",
        {
            "what": "accuracy and Fréchet distance (classifier features) of the model in float32",
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
            "real_held_out": floor(reader, pictures, options.seed),
        },
    )


if __name__ == "__main__":
    main()
