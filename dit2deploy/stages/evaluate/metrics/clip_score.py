"""CLIP score of images and their prompts (Hessel et al. 2021, https://arxiv.org/abs/2104.08718), by transformers."""

import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.stages.evaluate.metrics.pairs import Metric, Pairs, package, whole_numbers

_BATCH = 8
MODEL = "openai/clip-vit-base-patch16"


def measure(pairs: Pairs) -> dict[str, float]:
    """Mean of 100 max(cos(image, text), 0) of each model's images: the scale of torchmetrics, not the paper's 2.5."""
    model, processor = _load(pairs)
    return {
        "engine": _score(model, processor, pairs.engine, pairs.prompts),
        "full_precision": _score(model, processor, pairs.full_precision, pairs.prompts),
    }


def _load(pairs: Pairs):
    transformers = package("transformers", "transformers")
    where = str(pairs.clip or MODEL)
    try:
        model = transformers.CLIPModel.from_pretrained(where, local_files_only=True, use_safetensors=True)
        return model.eval(), transformers.CLIPProcessor.from_pretrained(where, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        cure = f"Download {MODEL} (`hf download {MODEL}`), or give the folder of a CLIP model (--clip)."
        raise Misuse(f"{where}: no CLIP model is on this disk: {reason}", cure) from None


def _score(model, processor, images: torch.Tensor, prompts: tuple[str, ...]) -> float:
    scores = []
    with torch.no_grad():
        for at in range(0, len(images), _BATCH):
            pictures = whole_numbers(images[at : at + _BATCH]).permute(0, 2, 3, 1)
            inputs = processor(
                text=list(prompts[at : at + _BATCH]),
                images=list(pictures.numpy()),
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            found = model(**inputs)
            scores.append(100 * (found.image_embeds * found.text_embeds).sum(-1).clamp(min=0))
    return torch.cat(scores).mean().item()


CLIP_SCORE = Metric("clip_score", "CLIP score", "higher", measure)
