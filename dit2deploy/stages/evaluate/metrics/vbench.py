"""VBench (Huang et al. 2024, https://arxiv.org/abs/2311.17982): the six dimensions that it has for any video.

The package vbench 0.1.5 fetches what it misses while it measures, so every file that a dimension takes is looked for
first. It pins versions of its own (transformers 4.33, numpy 1): it may live in another environment (--evaluators).
"""

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch

from dit2deploy.base.errors import Misuse
from dit2deploy.stages.evaluate.metrics.evaluator import require_modules, run
from dit2deploy.stages.evaluate.metrics.pairs import Metric, Pairs, fetched

CACHE = "VBENCH_CACHE_DIR"
CHILD = Path(__file__).with_name("vbench_child.py")
_MODULES = ("vbench", "cv2")
_CLIP = "https://openaipublic.azureedge.net/clip/models"
_VIT_B = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt"
_VIT_L = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt"
_DINO = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
# Dimension -> what it reads below the cache folder, and where that comes from. Read in vbench/utils.py, init_submodules
# with local=True, and in the modules of the dimensions.
FILES: dict[str, dict[str, str]] = {
    "subject_consistency": {
        "dino_model/facebookresearch_dino_main/hubconf.py": "https://github.com/facebookresearch/dino (git clone)",
        "dino_model/dino_vitbase16_pretrain.pth": _DINO,
    },
    "background_consistency": {"clip_model/ViT-B-32.pt": f"{_CLIP}/{_VIT_B}"},
    "motion_smoothness": {"amt_model/amt-s.pth": "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth"},
    "dynamic_degree": {
        "raft_model/models/raft-things.pth": "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip (unzip)",
    },
    "aesthetic_quality": {
        "clip_model/ViT-L-14.pt": f"{_CLIP}/{_VIT_L}",
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth": (
            "https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true"
        ),
    },
    "imaging_quality": {
        "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth": (
            "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth"
        ),
    },
}


def measure(pairs: Pairs, *, dimension: str) -> dict[str, float]:
    """The dimension's score of each model's videos, in 0 .. 1; they are given to it as mp4."""
    videos = _write(pairs)
    require_modules(pairs.python, _MODULES, install="pip install vbench; where it has its own Python, --evaluators.")
    cache = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "vbench")
    for name, url in FILES[dimension].items():
        fetched(cache / name, url)
    if dimension == "subject_consistency":  # DINO's hubconf takes no path: it has torch.hub fetch the weights once more
        fetched(Path(torch.hub.get_dir()) / "checkpoints" / _DINO.rpartition("/")[2], _DINO)
    prompts = dict(zip(_names(pairs), pairs.prompts[:: pairs.frames], strict=True))
    job = {"videos": str(videos), "dimension": dimension, "prompts": prompts}
    run(pairs.python, CHILD, (), job=job, cwd=videos, what=f"VBench's {dimension}")
    return {who: _score(videos, who, dimension) for who in ("engine", "full_precision")}


def _names(pairs: Pairs) -> list[str]:
    return [f"{index:05d}.mp4" for index in range(len(pairs.prompts) // pairs.frames)]


def _write(pairs: Pairs) -> Path:
    """FOLDER/WHO/NNNNN.npy, uint8 [F, H, W, 3], once for all dimensions; the child makes NNNNN.mp4 beside it."""
    videos = pairs.samples.resolve() / "vbench"
    if not videos.exists():
        for who, images in pairs.by_who().items():
            (videos / who).mkdir(parents=True)
            for name, video in zip(_names(pairs), images.reshape(-1, pairs.frames, *images.shape[1:]), strict=True):
                np.save((videos / who / name).with_suffix(".npy"), video)
    return videos


def _score(videos: Path, who: str, dimension: str) -> float:
    """Of the file that VBench writes: {dimension: [mean, [by video]]}."""
    path = videos / f"{who}-{dimension}_eval_results.json"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))[dimension][0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Misuse(f"{path}: is not what VBench writes: {error!r}.", "pip install vbench==0.1.5") from None


VBENCH = tuple(
    Metric(
        f"vbench_{name}",
        f"VBench {name.replace('_', ' ')}",
        "higher",
        functools.partial(measure, dimension=name),
        of="videos",
    )
    for name in FILES
)
