"""Trains the small digit reader that judges the demo model, and stores what it makes of real digits beside it."""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import nn
from train_demo import digits, place, random_shifts

from dit2deploy.base.files import write_tensors
from dit2deploy.evaluate.quality import Classifier, moments

HELD_OUT = 500
FEATURES = 32

EXAMPLE = """example:
  python tools/train_classifier.py --out dit2deploy/demo/classifier.safetensors"""


def split(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the digits that are trained on, and of the 500 that are held out (stratified by class)."""
    _, labels = digits()
    return train_test_split(np.arange(len(labels)), test_size=HELD_OUT, random_state=seed, stratify=labels)


def build_model() -> nn.Sequential:
    layers = {
        "conv1": nn.Conv2d(1, 16, 3, padding=1),
        "relu1": nn.ReLU(),
        "halve1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(16, 32, 3, padding=1),
        "relu2": nn.ReLU(),
        "halve2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "drop": nn.Dropout(0.3),
        "features": nn.Linear(512, FEATURES),
        "relu3": nn.ReLU(),
        "logits": nn.Linear(FEATURES, 10),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            placed = place(images[batch], random_shifts(len(batch), generator))
            # A little noise: the reader must not stumble over the last grain that a sampler leaves on the paper.
            placed = placed + 0.1 * torch.randn(placed.shape, generator=generator)
            value = nn.functional.cross_entropy(model(placed), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        schedule.step()
    model.eval()


def every_shift(images: torch.Tensor) -> np.ndarray:
    """The digits at all nine places, float32 [9 N, 1, 16, 16]."""
    shifts = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
    return torch.cat([place(images, shift.expand(len(images), 2)) for shift in shifts]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60, help="passes over the digits (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and batches (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("dit2deploy/demo/classifier.safetensors"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    images, labels = digits()
    seen, held_out = split(options.seed)
    model = build_model()
    train(model, images[seen], labels[seen], options.epochs, options.seed)

    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    moving = {"real.mean": np.zeros(FEATURES), "real.covariance": np.zeros((FEATURES, FEATURES))}
    reader = Classifier(tensors | moving, {})
    mean, covariance = moments(reader.features(every_shift(images[seen])))
    accuracy = reader.class_accuracy(every_shift(images[held_out]), np.tile(labels[held_out].numpy(), 9))
    metadata = {
        "held_out_accuracy": f"{accuracy:.4f}",
        "held_out": f"{HELD_OUT} digits at 9 places each",
        "real": f"moments of the features of the other {len(seen)} digits at 9 places each",
        "seed": str(options.seed),
        "epochs": str(options.epochs),
    }
    write_tensors(options.out, tensors | {"real.mean": mean, "real.covariance": covariance}, metadata)
    print(f"{options.out}: held-out accuracy {accuracy:.4f}, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
