"""Models asked by prompts: pairs of images from the same seeds, measured by what packages and weights are here."""

from pathlib import Path
from typing import Any

from dit2deploy.artefacts.bundle import QUALITY, Bundle
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_json
from dit2deploy.base.progress import note, report
from dit2deploy.targets import runnable


def evaluate_prompts(
    bundle: Path,
    *,
    prompts: Path,
    model: Path | None = None,
    clip: Path | None = None,
    real: Path | None = None,
    steps: int = 20,
    guidance: float = 1.5,
    seed: int = 0,
    target: str = "ort-cpu",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Draws each prompt of a file in full precision and with the engine, prompt i from seed `seed + i`, and writes
    quality.json: what each of METRICS says of the pairs. Frames of a video count as images of its prompt.

    `model` is the folder of the whole pipeline (None: where the bundle says that its model was), `clip` that of a CLIP
    model as transformers saves it, `real` one of real images for FID. Nothing is fetched: a metric whose package or
    weights are not here is left out, with a note that says what to install or download, which quality.json keeps.
    Raises Misuse for a folder that is no whole pipeline of this model, and for a target that cannot run here.
    """
    opened = Bundle.load(Path(bundle))
    opened.target(target)
    chosen = runnable(target)
    from dit2deploy.models.pipeline import read_prompts
    from dit2deploy.nn.drawn import draw_both
    from dit2deploy.stages.evaluate.metrics import METRICS
    from dit2deploy.stages.evaluate.metrics.pairs import Pairs

    texts = read_prompts(Path(prompts))
    settings = {"seed": seed, "steps": steps, "guidance": guidance}
    size = {"height": height, "width": width, "num_frames": frames}
    drawn = draw_both(opened, texts, model=model, engine=lambda: chosen.open(opened), **settings, **size)
    pairs = Pairs.of(drawn, texts, clip=clip, real=real)
    found = {}
    for done, metric in enumerate(METRICS):
        report("measure", done, len(METRICS))
        try:
            values = metric.measure(pairs)
        except Misuse as error:
            note(f"{metric.title} is not measured: {error.cause} {error.cure}")
            values = {"reason": error.cause, "cure": error.cure}
        found[metric.name] = {"title": metric.title, "better": metric.better, **values}
    report("measure", len(METRICS), len(METRICS))
    return write_results(
        opened.folder / QUALITY,
        "quality",
        {
            "target": target,
            "samples": len(texts),
            **settings,
            "size": size,
            "prompts_sha256": sha256_of_json(texts),
            "metrics": found,
        },
    )
