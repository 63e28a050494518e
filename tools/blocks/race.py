"""Engines in turns, by threads and batch: times, ratios within a round, errors and memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from blocks.engines import BASELINES, Engine
from blocks.made import OWN, TOKENS, Made, macs

from dit2deploy.base.progress import report
from dit2deploy.stages.profile.measure import METHOD as TURNS
from dit2deploy.stages.profile.measure import Contestant, race, ratios, statistics

EXACT = "torch fp32 eager"  # what errors are measured against
METHOD = (
    f"{TURNS} Each engine is in a process of its own (an order to it and its answer, some 0.1 ms, count for all). The "
    "model is a whole DiT of DiT-XL/2's geometry with random weights and `blocks` blocks; tokens are those of all "
    "samples together, 256 a sample. Memory: what the process grows by over its imports, after all runs. Files: the "
    "model and its weights as the engine opens them. Error: "
    "|y - y'| / |y| of a fresh input against PyTorch in float32; with random weights it shows that an engine computes "
    "the model, and says nothing about a method."
)


def measure(
    made: Made, names: Sequence[str], *, threads: Sequence[int], batches: Sequence[int], rounds: int, seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """`rows` of ratios, `engines` with times, errors and memory, and who is `not_measured`, with the reason."""
    rows, engines, missing = [], [], {}
    for count in threads:
        with (
            TemporaryDirectory(prefix="dit2deploy-") as folder,
            opened(made, names, count, Path(folder)) as (
                running,
                failed,
            ),
        ):
            missing |= failed
            timed = {}
            for batch in batches:
                turns = [Contestant(one.name, one.name, lambda one=one, batch=batch: one.run(batch)) for one in running]
                budget = seconds / len(threads) / len(batches)
                timed[batch] = race(turns, rounds=rounds, seconds=budget)
                rows += compared(timed[batch], made.blocks, threads=count, batch=batch)
            outputs = {one.name: one.result(Path(folder) / "result.npy", max(batches)) for one in running}
            exact = outputs.get(EXACT)
            for one in running:
                error = {} if exact is None else {"error": distance(outputs[one.name], exact)}
                for batch in batches:
                    found = speed(timed[batch][one.name], made.blocks, batch)
                    engines.append({"name": one.name, "threads": count, "tokens": TOKENS * batch, **found})
                    engines[-1] |= error | {f"{kind}_bytes": size for kind, size in one.memory().items()}
                    engines[-1]["stored_bytes"] = one.stored_bytes
    told = [{"what": name, "reason": reason} for name, reason in missing.items()]
    return {"rows": rows, "engines": engines, "not_measured": told}


@contextmanager
def opened(
    made: Made, names: Sequence[str], threads: int, folder: Path
) -> Iterator[tuple[list[Engine], dict[str, str]]]:
    """The engines that open, and why the others do not."""
    running: list[Engine] = []
    failed = {}
    try:
        for done, name in enumerate(names):
            report(f"open engines for {threads} threads", done, len(names))
            try:
                running.append(Engine(made, name, threads, folder / "errors.txt"))
            except RuntimeError as error:
                failed[name] = str(error)
        yield running, failed
    finally:
        for engine in running:
            engine.close()


def compared(times: Mapping[str, Sequence[float]], blocks: int, *, threads: int, batch: int) -> list[dict[str, Any]]:
    """A row for each engine of ours and each baseline."""
    baselines = [name for name in times if name in BASELINES]
    rows = []
    for own in (name for name in times if name in OWN):
        found = ratios({name: times[name] for name in (own, *baselines)}, own)
        for baseline, ratio in found.items():
            row = {"name": own, "baseline": baseline, **ratio, "threads": threads, "tokens": TOKENS * batch}
            least = min(times[baseline]) / min(times[own])
            rows.append({**row, "blocks": blocks, "runs": len(times[own]), "least_ratio": least})
    return rows


def speed(times: Sequence[float], blocks: int, batch: int) -> dict[str, float]:
    found = statistics(times, batch=batch)
    kept = {"ms": found["p50_ms"], "least_ms": found["min_ms"], "rounds": found["runs"]}
    return {**kept, "gmacs": macs(blocks, batch) / found["p50_ms"] / 1e6}


def distance(result: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(result - exact) / np.linalg.norm(exact))
