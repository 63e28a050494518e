"""The denoising loop in numpy: DDIM steps as diffusers computes them, guidance as its DiTPipeline does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import read_json

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")

# (latents f32 [B, C, H, W], timesteps i64 [B], labels i64 [B]) -> f32 [B, C or 2C, H, W]
Denoise = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scheduler:
    """A deterministic DDIM scheduler (eta = 0): fields, defaults and float32 arithmetic are those of
    diffusers' `DDIMScheduler`, formulas (12) and (16) of https://arxiv.org/abs/2010.02502."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Scheduler":
        """Reads a diffusers scheduler configuration; Misuse for what DDIM here does not do."""
        name = config.get("_class_name", "DDIMScheduler")
        if name != "DDIMScheduler":
            raise Misuse(
                f"scheduler: {name} is not supported.",
                "Convert it: diffusers.DDIMScheduler.from_config(pipeline.scheduler.config).",
            )
        if config.get("thresholding"):
            raise Misuse(
                "scheduler: thresholding is not supported.",
                "Set thresholding to false (or use clip_sample).",
            )
        known = {field: config[field] for field in cls.__dataclass_fields__ if field in config}
        if known.get("trained_betas") is not None:
            known["trained_betas"] = tuple(known["trained_betas"])
        for field, allowed in (
            ("beta_schedule", BETA_SCHEDULES),
            ("prediction_type", PREDICTION_TYPES),
            ("timestep_spacing", SPACINGS),
        ):
            if field in known and known[field] not in allowed:
                raise Misuse(
                    f"scheduler: {field} {known[field]!r} is not supported.",
                    f"Use one of {', '.join(allowed)}.",
                )
        return cls(**known)

    @classmethod
    def load(cls, path: Path) -> "Scheduler":
        """Reads scheduler_config.json from a file, a scheduler folder or a pipeline folder."""
        path = Path(path)
        if path.is_dir():
            nested = path / "scheduler"
            path = (nested if nested.is_dir() else path) / "scheduler_config.json"
        config = read_json(path, cure="Give a diffusers pipeline folder, its scheduler folder or the JSON file.")
        if not isinstance(config, dict):
            raise Misuse(
                f"{path}: holds no scheduler configuration.",
                "Save the scheduler anew with diffusers.",
            )
        return cls.from_config(config)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """float32 [num_train_timesteps]: the share of signal power that is left at each timestep."""
        return _cumprod(np.float32(1) - _betas(self))

    def timesteps(self, steps: int) -> np.ndarray:
        """int64 [steps], falling: where the model is asked when sampling takes `steps` steps."""
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise Misuse(f"steps: {steps} is not in 1..{total}.", "Choose a number of steps in that range.")
        if self.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
        if self.timestep_spacing == "trailing":
            return np.round(np.arange(total, 0, -total / steps)).astype(np.int64) - 1
        timesteps = (np.arange(steps) * (total // steps))[::-1].astype(np.int64) + self.steps_offset
        if timesteps[0] >= total:
            raise Misuse(
                f"scheduler: steps_offset {self.steps_offset} moves the first of {steps} steps to timestep "
                f"{timesteps[0]}, beyond {total - 1}.",
                "Use fewer steps.",
            )
        return timesteps

    def step(self, model_output: np.ndarray, timestep: int, sample: np.ndarray, *, steps: int) -> np.ndarray:
        """The latent one step further, float32, shaped like `sample`; `steps` as given to `timesteps`."""
        alpha = self.alphas_cumprod[timestep]
        before = int(timestep) - self.num_train_timesteps // steps
        if before >= 0:
            alpha_before = self.alphas_cumprod[before]
        else:
            alpha_before = np.float32(1) if self.set_alpha_to_one else self.alphas_cumprod[0]
        signal, noise = np.sqrt(alpha), np.sqrt(np.float32(1) - alpha)
        if self.prediction_type == "epsilon":
            clean, epsilon = (sample - noise * model_output) / signal, model_output
        elif self.prediction_type == "sample":
            clean, epsilon = model_output, (sample - signal * model_output) / noise
        else:
            clean = signal * sample - noise * model_output
            epsilon = signal * model_output + noise * sample
        if self.clip_sample:
            clean = np.clip(clean, -self.clip_sample_range, self.clip_sample_range)
        direction = np.sqrt(np.float32(1) - alpha_before) * epsilon
        return (np.sqrt(alpha_before) * clean + direction).astype(np.float32)


def _cumprod(values: np.ndarray) -> np.ndarray:
    # torch.cumprod carries float32 products in float64 on a CPU; so do we, to agree in the last bit.
    return np.cumprod(values.astype(np.float64)).astype(np.float32)


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    # torch.linspace fills float32 from both ends with fused multiply-adds, which float64 reproduces to the last bit.
    first, last = np.float32(start), np.float32(end)
    stride = np.float64((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    values = np.where(index < count // 2, first + stride * index, last - stride * index[::-1])
    return values.astype(np.float32)


def _betas(scheduler: Scheduler) -> np.ndarray:
    count = scheduler.num_train_timesteps
    if scheduler.trained_betas is not None:
        betas = np.asarray(scheduler.trained_betas, dtype=np.float32)
    elif scheduler.beta_schedule == "linear":
        betas = _linspace(scheduler.beta_start, scheduler.beta_end, count)
    elif scheduler.beta_schedule == "scaled_linear":
        betas = _linspace(scheduler.beta_start**0.5, scheduler.beta_end**0.5, count) ** 2
    else:
        edges = np.arange(count + 1, dtype=np.float64) / count
        signal = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999).astype(np.float32)
    return _zero_terminal_snr(betas) if scheduler.rescale_betas_zero_snr else betas


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Algorithm 1 of https://arxiv.org/abs/2305.08891: no signal is left at the last timestep."""
    root = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    cumulative = root**2
    alphas = np.concatenate([cumulative[:1], cumulative[1:] / cumulative[:-1]])
    return np.float32(1) - alphas


class Step(NamedTuple):
    """One denoising step of a batch; `output` is what the scheduler was given: after guidance, without sigma."""

    index: int
    timestep: int
    before: np.ndarray
    output: np.ndarray
    after: np.ndarray


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    """float32 [len(seeds), *shape]: unit normal latents, each from a numpy Generator of its own seed.

    A sample thus depends on its seed alone, however a batch is split.
    """
    draws = [np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in seeds]
    return np.stack(draws) if draws else np.zeros((0, *shape), np.float32)


def is_guided(guidance: float) -> bool:
    """Whether the model is asked without its label too: for scales above 1, as in diffusers' DiTPipeline."""
    return guidance > 1


def guided_output(output: np.ndarray, guidance: float) -> np.ndarray:
    """float32 [B, ..] of what the model gave, [conditional, unconditional] [2B, ..]: classifier-free guidance,
    unconditional + guidance * (conditional - unconditional), https://arxiv.org/abs/2207.12598."""
    conditional, unconditional = np.split(output, 2)
    return unconditional + np.float32(guidance) * (conditional - unconditional)


def trajectory(
    denoise: Denoise,
    *,
    scheduler: Scheduler,
    labels: np.ndarray,
    steps: int,
    guidance: float,
    noise: np.ndarray,
    null_label: int | None = None,
) -> Iterator[Step]:
    """Denoises `noise` (float32 [B, C, H, W]) to `labels` (integers [B]) and yields each step; the image is the
    last step's `after`.

    `denoise` is the model, see `Denoise`; where its output has 2C channels (learned sigma) the second half is
    ignored. Guidance of 1 or less asks the model once a step (`is_guided`). More doubles the batch to [conditional,
    unconditional], the latter with `null_label` (the model's number of classes), and extrapolates all latent
    channels (`guided_output`).
    """
    labels = np.asarray(labels, dtype=np.int64)
    latents = np.asarray(noise, dtype=np.float32)
    if latents.ndim != 4 or labels.shape != latents.shape[:1]:
        raise Misuse(
            f"trajectory: labels {labels.shape} do not match noise {latents.shape}.",
            "Give noise [B, C, H, W] and one label a sample.",
        )
    guided = is_guided(guidance)
    if guided:
        if null_label is None:
            raise Misuse(
                f"trajectory: guidance {guidance} needs a null_label.",
                "Give the number of classes, or guidance 1.",
            )
        labels = np.concatenate([labels, np.full_like(labels, null_label)])
    for index, timestep in enumerate(scheduler.timesteps(steps).tolist()):
        asked = np.concatenate([latents, latents]) if guided else latents
        output = denoise(asked, np.full(len(asked), timestep, np.int64), labels)
        output = _latent_channels(output, asked.shape)
        if guided:
            output = guided_output(output, guidance)
        after = scheduler.step(output, timestep, latents, steps=steps)
        yield Step(index, timestep, latents, output, after)
        latents = after


def _latent_channels(output: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    channels = shape[1]
    if output.shape not in (shape, (shape[0], 2 * channels, *shape[2:])):
        raise Misuse(
            f"trajectory: the model turned latents {shape} into {output.shape}.",
            "It must keep the shape, or double the channels (learned sigma).",
        )
    return output[:, :channels]
