"""Models asked by prompts: pairs of images from the same seeds, measured by what packages and weights are here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit2deploy.artefacts.bundle import QUALITY, Bundle
from dit2deploy.artefacts.results import write_results
from dit2deploy.base.disk import scratch_folder
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_json
from dit2deploy.base.progress import note, report
from dit2deploy.targets import runnable

if TYPE_CHECKING:
    from dit2deploy.stages.evaluate.metrics.pairs import Metric, Pairs


def evaluate_prompts(
    bundle: Path,
    *,
    prompts: Path,
    model: Path | None = None,
    clip: Path | None = None,
    real: Path | None = None,
    geneval: Path | None = None,
    evaluators: Path | None = None,
    keep: Path | None = None,
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
    model as transformers saves it, `real` one of real images for FID, `geneval` GenEval's repository. `evaluators` is
    the Python interpreter that GenEval and VBench are installed for (None: this one). What they read stays in the
    folder `keep`, where it is given. Nothing is fetched: a metric whose package or weights are not here is left out,
    with a note that says what to install or download, which quality.json keeps. Raises Misuse for a folder that is no
    whole pipeline of this model, for a `keep` that holds something, and for a target that cannot run here.
    """
    if keep is not None and Path(keep).exists() and any(Path(keep).iterdir()):
        raise Misuse(f"{keep}: is not empty.", "Give a new folder.")
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
    given = {"clip": clip, "real": real, "geneval": geneval, "python": evaluators}
    with _kept(keep) as samples:
        pairs = Pairs.of(drawn, texts, samples=samples, **given)
        kind = "images" if drawn["engine"].ndim == 4 else "videos"
        found = _measured([metric for metric in METRICS if metric.of in ("all", kind)], pairs)
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


@contextmanager
def _kept(folder: Path | None) -> Iterator[Path]:
    """The folder, or one that is removed at the end."""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
    else:
        with scratch_folder() as scratch:
            yield Path(scratch)


def _measured(metrics: "Sequence[Metric]", pairs: "Pairs") -> dict[str, Any]:
    """What each metric gives; of those that cannot be measured why, told once for those that share it."""
    found: dict[str, Any] = {}
    left_out: dict[tuple[str, str], list[str]] = {}
    for done, metric in enumerate(metrics):
        report("measure", done, len(metrics))
        try:
            values = metric.measure(pairs)
        except Misuse as error:
            left_out.setdefault((error.cause, error.cure), []).append(metric.title)
            values = {"reason": error.cause, "cure": error.cure}
        found[metric.name] = {"title": metric.title, "better": metric.better, **values}
    report("measure", len(metrics), len(metrics))
    for (cause, cure), titles in left_out.items():
        note(f"not measured: {', '.join(titles)}: {cause} {cure}")
    return found
