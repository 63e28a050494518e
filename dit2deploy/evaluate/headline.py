"""The headline figures of a bundle, read from the evidence in it: size, latency, parity, quality, engines."""

from collections.abc import Mapping
from typing import Any

from dit2deploy.artefacts.bundle import PARITY, PROFILE, QUALITY, Bundle
from dit2deploy.base.files import read_json
from dit2deploy.base.shown import megabytes
from dit2deploy.evaluate.fidelity import deciding


def headline(bundle: Bundle) -> dict[str, Any]:
    """What parity.json, profile.json and quality.json say in short; None for what was not measured, and for
    the recipe of a bundle without a policy.

    Latency is that of the profile's own headline setting (threads, batch); of parity, each check's worst SQNR in dB.
    """
    profile, parity, quality = (_evidence(bundle, name) for name in (PROFILE, PARITY, QUALITY))
    size, policy = bundle.manifest.size, bundle.policy
    return {
        "model": bundle.manifest.model,
        "recipe": policy.options.get("recipe", policy.method) if policy else None,
        "training": bundle.manifest.provenance.get("training"),
        "size": {"float32": size.float32, "bytes": sum(size.parts.values()), "ratio": size.ratio, "parts": size.parts},
        "speed": _speed(profile) if profile else None,
        "parity": _parity(parity) if parity else None,
        "quality": quality,
        "targets": {name: list(record.engines) for name, record in bundle.manifest.targets.items()},
    }


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A `headline` as (what, figure) for a table."""
    size = found["size"]
    lines = [
        (
            "weights, float32 -> engine",
            f"{megabytes(size['float32'])} -> {megabytes(size['bytes'])} ({size['ratio']:.1f}x smaller)",
        )
    ]
    if training := found.get("training"):
        lines.append(("training of the quantized weights", training))
    if speed := found["speed"]:
        setting = f"p50, batch {speed['batch']}, {speed['threads']} threads"
        for row in speed["latency"]:
            ratio = speed["ratios"].get(row["name"])
            beside = f" ({_compared(ratio)})" if ratio else ""
            lines.append((f"latency of a step, {setting}: {row['label']}", f"{row['p50_ms']:.2f} ms{beside}"))
    if parity := found["parity"]:
        worst = ", ".join(f"{name} {value:.1f} dB" for name, value in parity["worst_sqnr_db"].items())
        lines.append(
            ("parity, engine against quantized PyTorch", parity["status"] + (f": at least {worst}" if worst else ""))
        )
        if parity["cost_db"] is not None:
            cost = f"SQNR {parity['cost_db']:.1f} dB against full precision"
            lines.append(("cost of quantization, whole trajectory", cost))
    if found["quality"]:
        lines += quality_rows(found["quality"])
    return lines + [(f"engines for {name}", ", ".join(engines)) for name, engines in found["targets"].items()]


def _compared(ratio: Mapping[str, float]) -> str:
    """A ratio within rounds in words, by its quartiles."""
    low, high = ratio["p25"], ratio["p75"]
    if low < 1 < high:
        return f"no clear difference: within a round the engine is {low:.2f} to {high:.2f}x as fast"
    return f"within a round the engine is {ratio['ratio']:.2f}x as fast, quartiles {low:.2f} and {high:.2f}"


def quality_rows(quality: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "metrics" in quality:
        what = f"{quality['samples']} prompts"
        return [(f"{metric['title']}, {what}", metric_value(metric)) for metric in quality["metrics"].values()]

    def of(who: str) -> str:
        measured = quality[who]
        if "class_accuracy" not in measured:
            return f"not measured: {measured['reason']}"
        return f"{100 * measured['class_accuracy']:.1f} % read as asked, FD {measured['frechet_distance']:.2f}"

    what = f"quality of {quality['samples']} samples"
    return [(f"{what}, engine", of("engine")), (f"{what}, full precision", of("full_precision"))]


def metric_value(metric: Mapping[str, Any]) -> str:
    """A metric of quality.json in words: of the pairs, or of each model's images."""
    if "reason" in metric:
        return f"not measured: {metric['reason']} {metric['cure']}"
    if "pair" in metric:
        return f"{metric['pair']:.4g}" + (f" (worst {metric['worst']:.4g})" if "worst" in metric else "")
    return f"engine {metric['engine']:.4g}, full precision {metric['full_precision']:.4g}"


def _evidence(bundle: Bundle, name: str) -> dict[str, Any] | None:
    path = bundle.folder / name
    return read_json(path) if path.exists() else None


def _speed(profile: Mapping[str, Any]) -> dict[str, Any]:
    where = profile["headline"]

    def here(row: Mapping[str, Any]) -> bool:
        return all(row[key] == value for key, value in where.items())

    return {
        **where,
        "target": profile["target"],
        "measured": profile["date"],
        "machine": profile["machine"],
        "latency": [row for row in profile["latency"] if here(row)],
        "ratios": {
            row["baseline"]: {key: row[key] for key in ("ratio", "p25", "p75")}
            for row in profile["ratios"]
            if here(row)
        },
    }


def _parity(parity: Mapping[str, Any]) -> dict[str, Any]:
    checks = parity["engine_against_quantized"]
    worst = {name: deciding(check)["sqnr_db"] for name, check in checks.items() if check["status"] != "not run"}
    cost = parity["against_full_precision"].get("engine", {}).get("trajectory", {}).get("final")
    return {
        "status": parity["status"],
        "target": parity["target"],
        "worst_sqnr_db": worst,
        "cost_db": cost["sqnr_db"] if cost else None,
    }
