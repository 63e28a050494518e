"""Stage card: the model card of a bundle for a model hub, from the bundle's own evidence."""

from pathlib import Path

import numpy as np

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import write_bytes
from dit2deploy.evaluate.generate import Sampler
from dit2deploy.evaluate.headline import headline, rows
from dit2deploy.evaluate.images import grid, write_png
from dit2deploy.evaluate.words import counted
from dit2deploy.nn import at_hand
from dit2deploy.targets import runnable

CARD, PICTURE = "README.md", "samples.png"
COLUMNS = 8


def card(
    bundle: Path, *, base_model: str = "", licence: str = "", steps: int = 20, guidance: float = 1.5, seed: int = 0
) -> Path:
    """Writes BUNDLE/README.md: metadata as hubs read it, one measured table with where it was timed, one grid of
    samples (full precision above the engine, the same noise), how to use it, and what it was made from.

    `base_model` (a hub id; "": the one that the model was fetched by) and `licence` (an SPDX id) go into the metadata.
    Full precision is drawn where torch and the model are at hand. Raises Misuse for a bundle without parity.json or
    profile.json: a card shows what was measured.
    """
    opened = Bundle.load(Path(bundle))
    found = headline(opened)
    for name, what in (("parity", "parity"), ("speed", "profile")):
        if found[name] is None:
            raise Misuse(f"{opened.folder}: was not measured.", f"Run `dit2deploy {what} {opened.folder}` first.")
    speed, policy = found["speed"], opened.policy
    caption = _draw(opened, speed["target"], steps=steps, guidance=guidance, seed=seed)
    base_model = base_model or opened.manifest.provenance.get("model_hub", "").partition("@")[0]
    meta = {"base_model": base_model, "license": licence, "library_name": "dit2deploy"}
    header = [f"{key}: {value}" for key, value in meta.items() if value]
    header += ["base_model_relation: quantized"] if base_model else []
    table = [f"| {what} | {value.replace('|', '/')} |" for what, value in rows(found)]
    machine = speed["machine"]
    made_from = [
        f"- {name}: `{opened.manifest.provenance[name]}`" for name in _HASHES if name in opened.manifest.provenance
    ]
    versions = ", ".join(f"{name} {version}" for name, version in opened.manifest.versions.items())
    text = "\n".join(
        [
            "---",
            *header,
            "tags:",
            *(f"- {tag}" for tag in ("quantized", "diffusion-transformer", "onnx", found["recipe"]) if tag),
            "---",
            "",
            f"# {opened.manifest.model}, {found['recipe'] or 'quantized'}",
            "",
            f"Quantized with dit2deploy. Engines: {', '.join(opened.manifest.targets)}.",
            "",
            *(f"- {count} {what}: {words.line}" for what, words, count in (counted(policy) if policy else ())),
            "",
            "| | |",
            "|---|---|",
            *table,
            "",
            f"Timed on {machine['cpu']}, {machine['cores']} cores, {speed['measured'][:10]}, side by side in one run.",
            "",
            *caption,
            "## Use",
            "",
            "```python",
            "import dit2deploy",
            "",
            'pipe.transformer = dit2deploy.load("path/to/this/folder")   # any diffusers pipeline of this model',
            "```",
            "",
            "## Made from",
            "",
            *made_from,
            f"- versions: {versions}",
            "",
        ]
    )
    path = opened.folder / CARD
    write_bytes(path, text.encode())
    return path


_HASHES = ("model_sha256", "checkpoint_sha256", "policy_sha256")


def _draw(bundle: Bundle, target: str, *, steps: int, guidance: float, seed: int) -> list[str]:
    """Writes the picture and gives the lines that show it; the reason, where the model does not draw pixels."""
    try:
        sampler = Sampler.of(bundle)
    except Misuse as error:
        return [f"No samples are shown: {error.cause}", ""]
    chosen = runnable(target)
    labels = [int(label) for label in np.linspace(0, sampler.classes - 1, min(COLUMNS, sampler.classes))]
    settings = {"labels": labels, "seeds": range(seed, seed + len(labels)), "steps": steps, "guidance": guidance}
    engine, output = chosen.open(bundle), bundle.manifest.outputs[0].name
    try:
        drawn = {f"{target} engine": sampler.draw(lambda inputs: engine.run(inputs)[output], **settings)}
    finally:
        engine.close()
    if not at_hand.why_no_full_precision(bundle):
        drawn = {"full precision": sampler.draw(at_hand.full_precision(bundle), **settings), **drawn}
    write_png(bundle.folder / PICTURE, grid(list(drawn.values())))
    shown = " above ".join(drawn)
    told = f"labels {', '.join(map(str, labels))}, {steps} steps, guidance {guidance:g}, the same noise in a column"
    return [f"![samples]({PICTURE})", "", f"*{shown[0].upper()}{shown[1:]}; {told}.*", ""]
