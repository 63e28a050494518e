"""Trains a small DiT on digits (the demo) or coloured shapes and writes it as a diffusers pipeline folder."""

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
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from pictures import PICTURES, Pictures
from safetensors import safe_open
from safetensors.torch import save_file

from dit2deploy.base.files import write_json
from dit2deploy.base.machine import cores, cpu_model, versions

WARM_UP = 100
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.995
SAVE_EVERY = 100
REPORT_EVERY = 50

EXAMPLE = """example:
  nice -n 5 python tools/train_dit.py digits --minutes 38 --out dit2deploy/demo
  nice -n 5 python tools/train_dit.py shapes --steps 9000 --minutes 180 --out build/shapes

The cosine decay follows the larger of step fraction and time fraction, so a run that is cut by --minutes ends
fully decayed too. Kill it at will: the same command goes on from CHECKPOINT. Remove that file to start over."""


def build_model(pictures: Pictures) -> DiTTransformer2DModel:
    """The architecture for these pictures with adaLN-zero initialisation, which diffusers leaves to the trainer."""
    model = DiTTransformer2DModel(
        in_channels=pictures.channels,
        out_channels=pictures.channels,
        sample_size=pictures.size,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=len(pictures.names),
        norm_type="ada_norm_zero",
        **pictures.model,
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
    labels = torch.where(dropped, model.config.num_embeds_ada_norm, labels)
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
    pictures = PICTURES[options.pictures]
    model = build_model(pictures)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(options.seed)
    progress = {"seed": options.seed, "step": 0, "seconds": 0.0, "losses": [], "resumed": 0}
    if options.checkpoint.exists():
        progress = load_checkpoint(options.checkpoint, model, ema, optimizer, generator)
        if progress["seed"] != options.seed:
            sys.exit(f"{options.checkpoint} is of seed {progress['seed']}; remove it or give --seed {progress['seed']}")
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
        rate = options.rate * min(1, (progress["step"] + 1) / WARM_UP) * (1 + math.cos(math.pi * fraction)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, labels = pictures.train(options.batch, generator)
        value = loss(model, alphas_cumprod, images, labels, generator)
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


def write_pipeline(model: DiTTransformer2DModel, names: Sequence[str], out: Path) -> None:
    """Writes model_index.json, transformer/ (float16) and scheduler/ as diffusers lays a DiTPipeline out."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        parts = Path(folder)
        copy.deepcopy(model).half().save_pretrained(parts / "transformer")
        build_scheduler().save_pretrained(parts / "scheduler")
        index = {
            "_class_name": "DiTPipeline",
            "_diffusers_version": diffusers.__version__,
            "id2label": {str(index): name for index, name in enumerate(names)},
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
            "what": f"training of the model of {options.pictures}; losses are means over the last steps, [step, loss]",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": {"cpu": cpu_model(), "cores": cores(), "threads": options.threads},
            "versions": versions("torch", "diffusers", "numpy", "scikit-learn"),
            "command": shlex.join(["python", *sys.argv]),
            "batch": options.batch,
            **progress,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", choices=sorted(PICTURES), help="what it learns to draw")
    parser.add_argument("--steps", type=int, default=2800, help="optimizer steps (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-time budget (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step (default %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise (default 0)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument(
        "--checkpoint", type=Path, help="state of an unfinished run (default: OUT.training.safetensors)"
    )
    parser.add_argument("--record", type=Path, help="what the run did (default: tools/results/PICTURES_training.json)")
    options = parser.parse_args()
    options.checkpoint = options.checkpoint or options.out.with_name(f"{options.out.name}.training.safetensors")
    options.record = options.record or Path(f"tools/results/{options.pictures}_training.json")
    torch.set_num_threads(options.threads)
    model, progress = train(options)
    write_pipeline(model, PICTURES[options.pictures].names, options.out)
    write_record(options.record, options, progress)
    print(f"{options.out}: {progress['step']} steps in {progress['seconds'] / 60:.1f} minutes")


if __name__ == "__main__":
    main()
