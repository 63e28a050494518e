"""Trains the demo DiT on scikit-learn's 8x8 handwritten digits and writes it as a diffusers pipeline folder."""

import argparse
import copy
import datetime
import json
import math
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from dit2deploy.base.files import write_json
from dit2deploy.base.machine import cores, cpu_model, versions

CLASSES = 10
SIZE = 16
DRAWN = 12  # a digit is 12 x 12, so that at least one pixel of margin stays at each side
SHIFT = 1
BATCH = 64
PEAK_RATE = 1e-3
WARM_UP = 100
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.995
SAVE_EVERY = 100
REPORT_EVERY = 50

EXAMPLE = """example:
  nice -n 5 python tools/train_demo.py --minutes 38 --out dit2deploy/demo

The cosine decay follows the larger of step fraction and time fraction, so a run that is cut by --minutes ends
fully decayed too. Kill it at will: the same command goes on from CHECKPOINT. Remove that file to start over."""


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 digits as float32 [N, 1, 12, 12] in -1 (paper) .. 1 (ink), and their labels int64 [N]."""
    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.float32))[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=(DRAWN, DRAWN), mode="bicubic")
    # The source counts ink in blocks of 4 x 4: the gain gives strokes a core of full ink and the paper none.
    images = ((images - 0.5) * 1.3 + 0.5).clamp(0, 1)
    return images * 2 - 1, torch.from_numpy(data.target).long()


def place(images: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Pads 12 x 12 digits to [N, 1, 16, 16]; shifts int64 [N, 2] in -1..1 move them off the centre, never round it."""
    margin = (SIZE - DRAWN) // 2
    padded = images.new_full((len(images), 1, SIZE, SIZE), -1.0)
    for dy in range(-SHIFT, SHIFT + 1):
        for dx in range(-SHIFT, SHIFT + 1):
            rows = (shifts[:, 0] == dy) & (shifts[:, 1] == dx)
            y, x = margin + dy, margin + dx
            padded[rows, :, y : y + DRAWN, x : x + DRAWN] = images[rows]
    return padded


def random_shifts(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-SHIFT, SHIFT + 1, (count, 2), generator=generator)


def build_model() -> DiTTransformer2DModel:
    """The demo's architecture with adaLN-zero initialisation, which diffusers leaves to the trainer."""
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=6,
        sample_size=SIZE,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=CLASSES,
        norm_type="ada_norm_zero",
    )
    for linear in modulation_linears(model):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    # In train mode each block's own label embedder would drop labels independently of the others. Nothing else in
    # the model differs between the modes, so it trains in eval mode and `loss` drops labels once per sample.
    return model.eval()


def modulation_linears(model: DiTTransformer2DModel) -> list[torch.nn.Linear]:
    return [block.norm1.linear for block in model.transformer_blocks] + [
        model.proj_out_1,
        model.proj_out_2,
    ]


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def loss(model, alphas_cumprod, images, labels, generator) -> torch.Tensor:
    """Mean squared error of v = sqrt(a) noise - sqrt(1 - a) image over one batch."""
    count = len(images)
    # Stratified timesteps: one in each of `count` equal bands, which lowers the variance of the gradient.
    bands = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (bands * len(alphas_cumprod)).long().clamp(max=len(alphas_cumprod) - 1)
    dropped = torch.rand(count, generator=generator) < LABEL_DROPOUT
    labels = torch.where(dropped, CLASSES, labels)
    noise = torch.randn(images.shape, generator=generator)
    a = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * images + (1 - a).sqrt() * noise
    target = a.sqrt() * noise - (1 - a).sqrt() * images
    predicted = model(noisy, timestep=timesteps, class_labels=labels).sample
    return torch.nn.functional.mse_loss(predicted, target)


def save_checkpoint(path: Path, model, ema, optimizer, generator, progress: dict) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors["generator"] = generator.get_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, temporary, metadata={"progress": json.dumps(progress)})
    os.replace(temporary, path)


def load_checkpoint(path: Path, model, ema, optimizer, generator) -> dict:
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    for prefix, module in (("model.", model), ("ema.", ema)):
        module.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    generator.set_state(tensors["generator"])
    return progress


def train(options: argparse.Namespace) -> tuple[DiTTransformer2DModel, dict]:
    """Runs to the end of the schedule; returns the averaged model and what happened (steps, seconds, losses)."""
    torch.manual_seed(options.seed)
    model = build_model()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(options.seed)
    progress = {"seed": options.seed, "step": 0, "seconds": 0.0, "losses": [], "resumed": 0}
    if options.checkpoint.exists():
        progress = load_checkpoint(options.checkpoint, model, ema, optimizer, generator)
        if progress["seed"] != options.seed:
            sys.exit(f"{options.checkpoint} is of seed {progress['seed']}; remove it or give --seed {progress['seed']}")
    images, labels = digits()
    alphas_cumprod = build_scheduler().alphas_cumprod

    first, begun = progress["step"], time.monotonic() - progress["seconds"]
    recent: list[float] = []
    while True:
        progress["seconds"] = time.monotonic() - begun
        fraction = max(progress["step"] / options.steps, progress["seconds"] / (60 * options.minutes))
        if fraction >= 1:
            break
        if 0 < first == progress["step"]:
            progress["resumed"] += 1
        rate = PEAK_RATE * min(1, (progress["step"] + 1) / WARM_UP) * (1 + math.cos(math.pi * fraction)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        batch = place(images[chosen], random_shifts(BATCH, generator))
        value = loss(model, alphas_cumprod, batch, labels[chosen], generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress["step"] += 1
        step = progress["step"]
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        recent.append(value.item())
        if step % REPORT_EVERY == 0:
            mean = sum(recent) / len(recent)
            progress["losses"].append([step, round(mean, 5)])
            recent.clear()
            seconds = time.monotonic() - begun
            left = seconds / max(step / options.steps, seconds / (60 * options.minutes)) - seconds
            print(
                f"step {step:5d}/{options.steps}  loss {mean:.4f}  rate {rate:.2e}  "
                f"{seconds / step:.3f} s/step  {left / 60:.1f} min left",
                flush=True,
            )
        if step % SAVE_EVERY == 0:
            progress["seconds"] = time.monotonic() - begun
            save_checkpoint(options.checkpoint, model, ema, optimizer, generator, progress)
    save_checkpoint(options.checkpoint, model, ema, optimizer, generator, progress)
    return ema, progress


def write_pipeline(model: DiTTransformer2DModel, out: Path) -> None:
    """Writes model_index.json, transformer/ (float16) and scheduler/ as diffusers lays a DiTPipeline out."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        parts = Path(folder)
        copy.deepcopy(model).half().save_pretrained(parts / "transformer")
        build_scheduler().save_pretrained(parts / "scheduler")
        index = {
            "_class_name": "DiTPipeline",
            "_diffusers_version": diffusers.__version__,
            "id2label": {str(digit): str(digit) for digit in range(CLASSES)},
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": [None, None],
        }
        (parts / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        for part in sorted(parts.rglob("*.*")):
            final = out / part.relative_to(parts)
            final.parent.mkdir(exist_ok=True)
            part.chmod(0o644)  # safetensors leaves its files to their owner alone, and a wheel would keep that
            os.replace(part, final)


def write_record(path: Path, options: argparse.Namespace, progress: dict) -> None:
    """Writes what the run did, for the model card."""
    write_json(
        path,
        {
            "what": "training of the demo model; losses are means over the last steps, [step, loss]",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": {"cpu": cpu_model(), "cores": cores(), "threads": options.threads},
            "versions": versions("torch", "diffusers", "numpy", "scikit-learn"),
            "command": shlex.join(["python", *sys.argv]),
            "batch": BATCH,
            **progress,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2800, help="optimizer steps (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-time budget (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise (default 0)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("dit2deploy/demo"), help="folder (default %(default)s)")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("/tmp/dit2deploy_demo.safetensors"),
        help="where the state of an unfinished run lies (default %(default)s)",
    )
    parser.add_argument(
        "--record",
        type=Path,
        default=Path("tools/results/demo_training.json"),
        help="file that says what the run did (default %(default)s)",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, progress = train(options)
    write_pipeline(model, options.out)
    write_record(options.record, options, progress)
    print(f"{options.out}: {progress['step']} steps in {progress['seconds'] / 60:.1f} minutes")


if __name__ == "__main__":
    main()
