"""A bundle's GPU engines against the quantized PyTorch model (stage parity), and how long a step takes."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dit2deploy.base.errors import Failed, Misuse

TARGETS = ("ort-cuda", "tensorrt-rtx", "tensorrt")
RUNS = 30


def measure(folder: Path | None) -> Iterator[dict[str, Any]]:
    """An entry for each target: parity's verdict and times, or why there are none."""
    for target in TARGETS:
        told: dict[str, Any] = {"what": f"bundle of {target} against the reference"}
        try:
            if folder is None:
                raise Misuse("no --bundle was given.", "Name one that `dit2deploy build` made.")
            yield told | _measured(folder, target)
        except ImportError as error:
            yield told | {"reason": str(error)}
        except Misuse as error:
            yield told | {"reason": error.cause, "cure": error.cure}
        except Failed as error:
            yield told | {"parity": "failed", "reason": error.cause}


def _measured(folder: Path, target: str) -> dict[str, Any]:
    from dit2deploy.artefacts.bundle import Bundle
    from dit2deploy.stages.parity import parity
    from dit2deploy.stages.profile.contestants import inputs_of
    from dit2deploy.targets import runnable

    bundle = Bundle.load(folder)
    bundle.target(target)
    chosen = runnable(target)
    verdict = parity(folder, target=target)
    inputs, times = inputs_of(bundle, batch=2), []
    runner = chosen.open(bundle)
    for _ in range(2 + RUNS):  # the first warms up, the second is captured
        begin = time.perf_counter()
        runner.run(inputs)
        times.append(1e3 * (time.perf_counter() - begin))
    runner.close()
    return {
        "model": bundle.manifest.model,
        "parity": verdict["status"],
        "engine_against_quantized": verdict["engine_against_quantized"],
        "step_ms": {"median": float(np.median(times[2:])), "first": times[0], "captured": times[1], "runs": RUNS},
        "method": "wall clock of one step at batch 2, inputs copied in and outputs copied out",
    }
