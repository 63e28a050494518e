"""report(): gathers the evidence that lies in a bundle and renders report.html."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from dit2deploy import __version__
from dit2deploy.artefacts.bundle import PARITY, PROFILE, QUALITY, REPORT, Bundle
from dit2deploy.artefacts.results import circumstances
from dit2deploy.base import shown
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import read_json, write_bytes
from dit2deploy.evaluate import charts, profile_charts
from dit2deploy.evaluate.headline import metric_value
from dit2deploy.stages.report import facts, parity_charts
from dit2deploy.stages.report.pictures import Pictures, draw

_TEMPLATE = "report.html.j2"


def report(
    bundle: Path,
    *,
    samples: Mapping[str, np.ndarray] | None = None,
    steps: int = 20,
    guidance: float = 1.5,
    seed: int = 0,
    target: str = "ort-cpu",
) -> Path:
    """Writes BUNDLE/report.html, which needs no network, from the bundle and the parity.json, profile.json and
    quality.json in it; a section whose evidence is missing says which command makes it.

    `samples`: who drew -> images [N, C, H, W] in -1..1, shown side by side in this order. None: drawn here from the
    same seeds by full precision and the quantized model (where torch and their files are at hand) and by the engine.
    Raises Misuse for a bundle that is missing, broken or was changed.
    """
    opened = Bundle.load(Path(bundle))
    evidence = {name: _evidence(opened.folder / file) for name, file in _FILES.items()}
    pictures = draw(opened, samples, target=target, steps=steps, guidance=guidance, seed=seed)
    try:
        page = render(opened, evidence, pictures)
    except (KeyError, TypeError, jinja2.UndefinedError) as error:
        there = ", ".join(_FILES[name] for name, found in evidence.items() if found is not None)
        raise Misuse(
            f"{opened.folder}: one of {there} is not what this dit2deploy writes ({error}).",
            "Make them anew with `dit2deploy parity`, `dit2deploy profile` and `dit2deploy evaluate`.",
        ) from error
    path = opened.folder / REPORT
    write_bytes(path, page.encode())
    return path


_FILES = {"parity": PARITY, "profile": PROFILE, "quality": QUALITY}


def render(bundle: Bundle, evidence: Mapping[str, Any], pictures: Pictures) -> str:
    """The page; `evidence` holds the content of parity.json, profile.json and quality.json, or None each."""
    parity, profile = evidence["parity"], evidence["profile"]
    figures: dict[str, Markup] = {}
    if profile:
        figures |= {
            name: _figure(name, figure, _PROFILE_TITLES[name])
            for name, figure in profile_charts.figures(profile).items()
        }
    if parity:
        figures |= {
            f"parity-{name}": _figure(f"parity-{name}", figure, title)
            for name, (figure, title) in parity_charts.figures(parity).items()
        }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"megabytes": shown.size, "ms": facts.milliseconds, "db": facts.decibels}
    environment.filters["metric_value"] = metric_value
    return environment.get_template(_TEMPLATE).render(
        manifest=bundle.manifest,
        folder=str(bundle.folder),
        version=__version__,
        made=circumstances(),
        cards=facts.cards(bundle, evidence),
        policy=facts.policy(bundle),
        parts=facts.parts(bundle),
        latency=facts.latency(profile) if profile else None,
        checks=facts.checks(parity) if parity else None,
        engines=facts.engines(bundle, evidence),
        pictures=pictures,
        figures=figures,
        **evidence,
    )


_PROFILE_TITLES = {
    "latency": "Latency of one denoising step: median, with whiskers from the 10th to the 90th percentile",
    "ops": "Time of one step by op type",
    "roofline": "GEMM nodes of the engine below the measured peak of this machine",
}


def _figure(name: str, figure: Any, title: str) -> Markup:
    return Markup(charts.page_svg(figure, name=name, title=title))


def _evidence(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None
