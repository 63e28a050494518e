"""Whole pipelines of diffusers from a folder on the disk: text encoders, VAE and scheduler around a transformer."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import read_json
from dit2deploy.base.progress import track
from dit2deploy.models.family import Family
from dit2deploy.models.load import INDEX

_CURE = "Give the folder of a whole pipeline, with its text encoders, tokenizers, VAE and scheduler."
BATCH = 4  # prompts at a time: memory does not grow with their number
# What loading and calling a pipeline raises where its parts do not fit.
_BROKEN = (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line, empty lines left out. Raises Misuse for a file that is missing, no UTF-8 text, or empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Misuse(f"{path}: cannot be read: {error.strerror}.", "Give a text file with a prompt a line.") from None
    except UnicodeDecodeError:
        raise Misuse(f"{path}: is no UTF-8 text.", "Give a text file with a prompt a line.") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise Misuse(f"{path}: holds no prompt.", "Give a text file with a prompt a line.")
    return found


def open_pipeline(path: Path) -> Any:
    """The pipeline of a folder in float32 on the CPU; nothing is fetched, safetensors only.

    Raises Misuse for a folder that holds no pipeline, and for one that lacks a component that its index names.
    """
    index = read_json(path / INDEX, cure=_CURE)
    for name, kind in index.items():
        if isinstance(kind, list) and kind[0] is not None and not (path / name).is_dir():
            raise Misuse(f"{path}: its index names the component {name}, which is not there.", _CURE)
    if "text_encoder" not in index or "tokenizer" not in index:
        raise Misuse(f"{path}: has no text_encoder and tokenizer, which prompts take.", _CURE)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            path, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
    except _BROKEN as error:
        raise Misuse(f"{path}: diffusers cannot load the pipeline: {_first_line(error)}", _CURE) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, prompts: Sequence[str], *, what: str, **settings: Any) -> np.ndarray:
    """What `batches` draws with the same arguments, as one array."""
    return np.concatenate(list(batches(pipe, prompts, what=what, **settings)))


def batches(
    pipe: Any,
    prompts: Sequence[str],
    *,
    what: str,
    seed: int,
    steps: int,
    guidance: float,
    **size: int | None,
) -> Iterator[np.ndarray]:
    """What the pipeline draws for the prompts, BATCH of them after another: images float [N, H, W, 3] or frames
    [N, F, H, W, 3] in 0 .. 1. Prompt i has the seed `seed + i`, whatever the batches.

    `what` names the progress. `size`: height, width, num_frames; None is the pipeline's own. Raises Misuse for what the
    pipeline does not take.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    options = {"guidance_scale": guidance, **{name: value for name, value in size.items() if value is not None}}
    for name in options:
        if name not in known:
            raise Misuse(f"{type(pipe).__name__}: takes no {name}.", "Leave it out.")
    if "use_resolution_binning" in known:
        options["use_resolution_binning"] = (
            False  # PixArt: the size that is asked for, not the nearest it was trained on
        )
    options |= {"num_inference_steps": steps, "output_type": "np"}
    for first in track(range(0, len(prompts), BATCH), what):
        few = list(prompts[first : first + BATCH])
        generators = [torch.Generator().manual_seed(seed + first + index) for index in range(len(few))]
        try:
            made = pipe(prompt=few, generator=generators, **options)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise Misuse(f"{type(pipe).__name__}: refuses the prompts: {_first_line(error)}", _CURE) from error
        yield np.asarray(made.frames if hasattr(made, "frames") else made.images)


@contextmanager
def recording(transformer: torch.nn.Module, family: Family) -> Iterator[list[dict[str, np.ndarray]]]:
    """Yields a list that every call of the pipeline's transformer is added to: arrays by the names of family.inputs.

    Within, a call raises Misuse that passes what the family has no input for (a mask, where it knows none).
    """
    calls: list[dict[str, np.ndarray]] = []
    wanted = family.inputs(transformer.config, batch=1, seed=0)
    signature = inspect.signature(type(transformer).forward)

    def see(module: torch.nn.Module, arguments: tuple, keywords: Mapping[str, Any]) -> None:
        given = dict(signature.bind(module, *arguments, **keywords).arguments)
        given.pop("self")
        given.pop("return_dict", None)
        given = family.arguments({**_defaults(signature, given), **given})
        for name, value in given.items():
            if name not in wanted and not says_nothing(value, signature.parameters[name].default):
                raise Misuse(
                    f"{family.class_name}: the pipeline passes {name}, which this family is not served with.",
                    "Calibrate without prompts.",
                )
        missing = [name for name in wanted if given.get(name) is None]
        if missing:
            raise Misuse(f"{family.class_name}: the pipeline passes no {missing[0]}.", "Calibrate without prompts.")
        calls.append({name: given[name].detach().to(tensor.dtype).numpy().copy() for name, tensor in wanted.items()})

    hook = transformer.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _defaults(signature: inspect.Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in given and name != "return_dict" and parameter.default is not parameter.empty
    }


def says_nothing(value: Any, default: Any) -> bool:
    """Whether an argument is as good as left out."""
    return value is None or value is default or (isinstance(value, dict) and not value)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
