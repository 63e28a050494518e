"""GenEval (Ghosh et al. 2023, https://arxiv.org/abs/2310.11513) by its own scripts, which find objects.

GenEval is no package: its repository is cloned, its environment (environment.yml: mmdet 2.27) is another than ours, and
its evaluator wants an NVIDIA GPU. It reads, as its README says,

    FOLDER/NNNNN/metadata.jsonl         line NNNNN of prompts/evaluation_metadata.jsonl
    FOLDER/NNNNN/samples/0000.png ..    images of that prompt
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import write_bytes
from dit2deploy.evaluate.images import write_png
from dit2deploy.stages.evaluate.metrics.evaluator import require_modules, run
from dit2deploy.stages.evaluate.metrics.pairs import Metric, Pairs, fetched

REPOSITORY = "https://github.com/djghosh13/geneval"
METADATA = Path("prompts") / "evaluation_metadata.jsonl"
EVALUATOR = Path("evaluation") / "evaluate_images.py"
DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"
_MODULES = ("torch", "mmdet", "open_clip", "clip_benchmark", "pandas")
_DETECTOR_URL = (
    "https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth"
)
# open_clip 2.20 of its environment takes another file of this name for a broken download, and fetches it again.
_CLIP_SHA256 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
_CLIP_URL = f"https://openaipublic.azureedge.net/clip/models/{_CLIP_SHA256}/ViT-L-14.pt"


def measure(pairs: Pairs) -> dict[str, Any]:
    """The overall score, the mean over the tasks of the share of images that are right (summary_scores.py); "tasks":
    that share by task; "images": how many each drew. Tasks of which there is no prompt are missing from the mean."""
    if pairs.geneval is None:
        raise Misuse("no folder of GenEval is given.", f"git clone {REPOSITORY}, and give it (--geneval).")
    repository = pairs.geneval.resolve()
    folders = _write(pairs, repository)
    fetched(repository / DETECTOR, _DETECTOR_URL)
    fetched(Path.home() / ".cache" / "clip" / "ViT-L-14.pt", _CLIP_URL, sha256=_CLIP_SHA256)
    require_modules(
        pairs.python, _MODULES, install="Install GenEval as its README says; name its Python (--evaluators)."
    )
    scores = {}
    for who, folder in folders.items():
        results = folder.with_name(f"{who}.jsonl")
        arguments = [str(folder), "--outfile", str(results), "--model-path", str(repository)]
        run(pairs.python, repository / EVALUATOR, arguments, cwd=repository, what=f"GenEval's {EVALUATOR.name}")
        scores[who] = tasks_of(results)
    overall = {who: sum(tasks.values()) / len(tasks) for who, tasks in scores.items()}
    return {**overall, "tasks": scores, "images": len(pairs.prompts)}


def _write(pairs: Pairs, repository: Path) -> dict[str, Path]:
    """Writes the folders that the evaluator reads, by who drew. Misuse for prompts that are none of GenEval's."""
    entries = _metadata(repository)
    numbers = {entry["prompt"]: number for number, entry in enumerate(entries)}
    if missing := [prompt for prompt in pairs.prompts if prompt not in numbers]:
        raise Misuse(
            f"{len(missing)} prompts are none of GenEval's, the first: {missing[0]!r}.",
            f"Take those of {repository / METADATA}, one a line.",
        )
    folders = {}
    for who, images in pairs.by_who().items():
        folders[who] = pairs.samples.resolve() / "geneval" / who
        drawn: dict[int, int] = {}
        for prompt, image in zip(pairs.prompts, images, strict=True):
            number = numbers[prompt]
            folder = folders[who] / f"{number:05d}"
            write_bytes(folder / "metadata.jsonl", json.dumps(entries[number]).encode())
            write_png(folder / "samples" / f"{drawn.get(number, 0):04d}.png", image)
            drawn[number] = drawn.get(number, 0) + 1
    return folders


def _metadata(repository: Path) -> list[Mapping[str, Any]]:
    path = repository / METADATA
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise Misuse(f"{path}: cannot be read: {error}.", f"Give a clone of {REPOSITORY} (--geneval).") from None


def tasks_of(results: Path) -> dict[str, float]:
    """The share of images that are right, by task in order of appearance, of the file that the evaluator writes."""
    found: dict[str, list[bool]] = {}
    try:
        for line in results.read_text(encoding="utf-8").splitlines():
            if line.strip():
                entry = json.loads(line)
                found.setdefault(entry["tag"], []).append(bool(entry["correct"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Misuse(f"{results}: is not what GenEval's evaluator writes: {error!r}.", "Clone it anew.") from None
    if not found:
        raise Misuse(f"{results}: GenEval's evaluator read no image.", "Clone it anew.")
    return {task: sum(right) / len(right) for task, right in found.items()}


GENEVAL = Metric("geneval", "GenEval", "higher", measure, of="images")
