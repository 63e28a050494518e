"""What the report says in numbers and tables, ready for the template."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.base import shown
from dit2deploy.evaluate import profile_charts
from dit2deploy.evaluate.fidelity import deciding
from dit2deploy.evaluate.headline import metric_value
from dit2deploy.evaluate.words import Words, of_policy
from dit2deploy.targets import by_name

_PARTS = {
    "ternary": "ternary weights",
    "int3": "int3 weights",
    "int4": "int4 weights",
    "int8": "int8 weights",
    "scales": "scales and activation limits",
    "low_rank": "low-rank branches",
    "monarch": "Monarch branches",
    "float": "left in full precision",
}
_NAMES = {"layers": "each layer", "steps": "single steps", "trajectory": "whole trajectory"}


@dataclass(frozen=True)
class Card:
    """One headline figure; `state` is "", "passed", "failed" or "missing"."""

    title: str
    figure: str
    detail: str
    state: str = ""


@dataclass
class PolicyRow:
    """Layers that are treated alike; `patterns` are their names with numbers as *."""

    weight: str
    activation: str
    rotation: str
    branch: str
    layers: list[str] = field(default_factory=list)

    @property
    def patterns(self) -> list[str]:
        return list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name, count=1) for name in self.layers))


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def decibels(value: float) -> str:
    """parity.json writes 300 for equality."""
    return "equal" if value >= 300 else f"{value:.1f} dB"


def cards(bundle: Bundle, evidence: Mapping[str, Any]) -> list[Card]:
    size = bundle.manifest.size
    made = [
        Card(
            "Weights",
            f"{size.ratio:.1f}\u00d7 smaller",
            f"{shown.size(size.float32)} in float32, {shown.size(sum(size.parts.values()))} in the bundle",
        )
    ]
    return [
        *made,
        _latency_card(evidence["profile"]),
        _parity_card(evidence["parity"]),
        _quality_card(evidence["quality"]),
    ]


def _latency_card(profile: Mapping[str, Any] | None) -> Card:
    if profile is None:
        return Card("Latency", "not measured", "dit2deploy profile measures it", "missing")
    own = profile_charts.headline(profile)[0]
    others = [f"{ratio:.2f}\u00d7 as fast as {label}" for label, ratio in _ratios(profile)]
    where = f"one step, batch {own['batch']}, {own['threads']} thread{'s' if own['threads'] > 1 else ''}"
    return Card("Latency", milliseconds(own["p50_ms"]), "; ".join([where, *others]))


def _ratios(profile: Mapping[str, Any]) -> list[tuple[str, float]]:
    labels = {row["name"]: row["label"] for row in profile["latency"]}
    where = profile["headline"]
    return [
        (labels[row["baseline"]], row["ratio"])
        for row in profile["ratios"]
        if all(row[key] == value for key, value in where.items())
    ]


def _parity_card(parity: Mapping[str, Any] | None) -> Card:
    if parity is None:
        return Card("Parity", "not shown", "dit2deploy parity shows it", "missing")
    checks = parity["engine_against_quantized"]
    worst = [
        f"{_NAMES[name]} {decibels(deciding(check)['sqnr_db'])}"
        for name, check in checks.items()
        if check["status"] != "not run"
    ]
    state = parity["status"] if parity["status"] in ("passed", "failed") else "missing"
    reason = next((check["reason"] for check in checks.values() if check["status"] == "not run"), "")
    return Card("Parity", parity["status"], ", ".join(worst) or reason, state)


def _quality_card(quality: Mapping[str, Any] | None) -> Card:
    if quality is None:
        return Card("Quality", "not measured", "dit2deploy evaluate measures it", "missing")
    if "metrics" in quality:
        found = [metric for metric in quality["metrics"].values() if "reason" not in metric]
        told = "; ".join(f"{metric['title']}: {metric_value(metric)}" for metric in found)
        return Card("Quality", f"{quality['samples']} prompts", told)
    own, full = quality["engine"], quality["full_precision"]
    detail = f"FD {own['frechet_distance']:.1f}, {quality['samples']} samples"
    if "reason" not in full:
        detail += f"; full precision {full['class_accuracy']:.1%}, FD {full['frechet_distance']:.1f}"
    return Card("Class accuracy", f"{own['class_accuracy']:.1%}", detail)


def policy(bundle: Bundle) -> Mapping[str, Any] | None:
    """Rows of layers and attentions that are treated alike, and the full list; None where the bundle has no policy."""
    found = bundle.policy
    if found is None:
        return None
    rows: dict[Words, PolicyRow] = {}
    for _, name, words in of_policy(found):
        rows.setdefault(words, PolicyRow(*words)).layers.append(name)
    return {
        "method": found.method,
        "groups": found.timestep_bounds,
        "rows": sorted(rows.values(), key=lambda row: -len(row.layers)),
        "layers": [(name, *words) for _, name, words in of_policy(found)],
    }


def parts(bundle: Bundle) -> list[dict[str, Any]]:
    """Where the bytes are, largest first; `percent` of the bundle's weights, `colour` a series of the charts."""
    total = sum(bundle.manifest.size.parts.values()) or 1
    rows = sorted(
        ((name, count) for name, count in bundle.manifest.size.parts.items() if count), key=lambda row: -row[1]
    )
    return [
        {"name": _PARTS.get(name, name), "bytes": count, "percent": 100 * count / total, "colour": index % 7 + 1}
        for index, (name, count) in enumerate(rows)
    ]


def latency(profile: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All rows of latency, each with how many times as fast the engine is ("" for itself)."""
    ratio = {(row["baseline"], row["threads"], row["batch"]): row for row in profile["ratios"]}
    return [{**row, "ratio": ratio.get((row["name"], row["threads"], row["batch"]))} for row in profile["latency"]]


def checks(parity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a check: the question, its status, the deciding value and where it lies."""
    rows = []
    cost = parity["against_full_precision"]
    for question, found in (
        ("engine against quantized PyTorch", parity["engine_against_quantized"]),
        ("quantized against full precision", cost["quantized"]),
        ("engine against full precision", cost["engine"]),
    ):
        for name, check in found.items():
            row = {
                "question": question,
                "name": _NAMES.get(name, name),
                "status": check["status"],
                "value": "",
                "where": "",
            }
            if check["status"] == "not run":
                row["where"] = check["reason"]
            else:
                worst = deciding(check)
                row["value"] = decibels(worst["sqnr_db"])
                row["where"] = "final latents" if "final" in check else _place(worst)
                row["threshold"] = check.get("threshold_db")
                if row["threshold"] is None:
                    row["status"] = "measured"
            rows.append(row)
    return rows


def _place(value: Mapping[str, Any]) -> str:
    return f"worst: {value['layer']}" if "layer" in value else f"worst: timestep {value['timestep']:g}"


def engines(bundle: Bundle, evidence: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each target: its engine files, what was shown of it here and what was not."""
    rows = []
    for name, record in bundle.manifest.targets.items():
        able = by_name(name).availability()
        shown, open_ = ["built"], []
        for kind, verb in (("parity", "compared with PyTorch"), ("profile", "timed on this machine")):
            found = evidence[kind]
            done = found is not None and found["target"] == name and found.get("status", "passed") != "not run"
            (shown if done else open_).append(verb)
        rows.append(
            {
                "name": name,
                "files": [
                    {"label": label, "file": file, "bytes": bundle.path(file).stat().st_size}
                    for label, file in record.engines.items()
                ],
                "bytes": record.weight_bytes,
                "details": {
                    key: _plain(value) for key, value in record.details.items() if _plain(value) and key != "parts"
                },
                "versions": record.versions,
                "shown": ", ".join(shown),
                "open": ", ".join(open_),
                "reason": "" if able.can_run else f"{able.reason} {able.cure}".strip(),
            }
        )
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(part) for part in value)
    return str(value)
