"""parity.json in a few lines for people."""

from collections.abc import Mapping
from typing import Any

from dit2deploy.evaluate.fidelity import deciding


def summary(result: Mapping[str, Any]) -> str:
    """Both questions, each with its layers, steps and trajectory."""
    lines = [f"{result['target']}: does the engine compute the quantized model? {result['status']}"]
    lines += _lines(result["engine_against_quantized"])
    cost = result["against_full_precision"]
    for who, title in (("quantized", "the quantized model in PyTorch"), ("engine", "the engine")):
        lines.append(f"what did quantization cost? {title} against full precision")
        lines += _lines(cost[who])
    return "\n".join(lines)


def _lines(checks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"  {name:<11}{_line(check)}" for name, check in checks.items()]


def _line(check: Mapping[str, Any]) -> str:
    if check["status"] == "not run":
        return f"not run: {check['reason']}"
    told = deciding(check)
    where = "at the end"
    if "final" not in check:
        where = f"at worst, {told['layer'] if 'layer' in told else 'timestep {:g}'.format(told['timestep'])}"
    text = f"SQNR {told['sqnr_db']:.1f} dB {where}"
    if "left_out" in check:
        text += f"; {len(check['left_out'])} layers left out: {check['why_left_out']}"
    if "threshold_db" not in check:
        return text
    return f"{check['status']}: {text} (at least {check['threshold_db']:g} dB)"
