"""Trains the small network that judges a model's pictures, and stores what it makes of real ones beside it."""

import argparse
from pathlib import Path

import numpy as np
import torch
from pictures import HELD_OUT, PICTURES, Pictures
from torch import nn

from dit2deploy.base.files import write_tensors
from dit2deploy.evaluate.quality import Classifier, moments

FEATURES = 32
BATCH = 64
REAL = 10_000  # pictures whose moments are stored

EXAMPLE = """example:
  python tools/train_classifier.py digits --out dit2deploy/demo/classifier.safetensors
  python tools/train_classifier.py shapes --batches 6000 --out build/shapes/classifier.safetensors"""


def build_model(pictures: Pictures) -> nn.Sequential:
    layers = {
        "conv1": nn.Conv2d(pictures.channels, 16, 3, padding=1),
        "relu1": nn.ReLU(),
        "halve1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(16, 32, 3, padding=1),
        "relu2": nn.ReLU(),
        "halve2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "drop": nn.Dropout(0.3),
        "features": nn.Linear(32 * (pictures.size // 4) ** 2, FEATURES),
        "relu3": nn.ReLU(),
        "logits": nn.Linear(FEATURES, len(pictures.names)),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def train(model: nn.Module, pictures: Pictures, batches: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
    model.train()
    for _ in range(batches):
        images, labels = pictures.reader(BATCH, generator)
        # A little noise: the reader must not stumble over the last grain that a sampler leaves.
        images = images + 0.1 * torch.randn(images.shape, generator=generator)
        value = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", choices=sorted(PICTURES), help="what it learns to read")
    parser.add_argument("--batches", type=int, default=1260, help=f"of {BATCH} pictures (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    pictures = PICTURES[options.pictures]
    model = build_model(pictures)
    train(model, pictures, options.batches, options.seed)

    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    moving = {"real.mean": np.zeros(FEATURES), "real.covariance": np.zeros((FEATURES, FEATURES))}
    reader = Classifier(tensors | moving, {})
    real, _ = pictures.reader(REAL, torch.Generator().manual_seed(options.seed + 1))
    mean, covariance = moments(reader.features(real.numpy()))
    images, labels = pictures.held_out(10 * HELD_OUT, options.seed)
    accuracy = reader.class_accuracy(images.numpy(), labels.numpy())
    metadata = {
        "held_out_accuracy": f"{accuracy:.4f}",
        "held_out": f"{10 * HELD_OUT} pictures that it was not trained on",
        "real": f"moments of the features of {REAL} pictures that it was trained on",
        "seed": str(options.seed),
        "batches": str(options.batches),
    }
    write_tensors(options.out, tensors | {"real.mean": mean, "real.covariance": covariance}, metadata)
    print(f"{options.out}: held-out accuracy {accuracy:.4f}, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
