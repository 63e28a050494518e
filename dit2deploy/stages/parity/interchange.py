"""What was compared, in Polygraphy's own files: `polygraphy inspect data`, `run --load-outputs` and RunResults.load."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from polygraphy.comparator import RunResults
from polygraphy.json import save_json

from dit2deploy.base.files import whole_file
from dit2deploy.stages.parity.evidence import Evidence, few

FOLDER = "parity"
OUTPUTS = "outputs.json"
INPUTS = "inputs.json"


def write(folder: Path, evidence: Evidence) -> None:
    """`folder` / inputs.json and outputs.json: a few of the single steps, and what each side gave for them.

    The first runner of outputs.json is the engine; quantized and full-precision PyTorch follow where they were run.
    """
    results = RunResults()
    for side in (evidence.engine, evidence.quantized, evidence.full_precision):
        if side.steps is not None:
            ((name, iterations),) = side.steps
            results.append((name, few(list(iterations))))
    with whole_file(folder / OUTPUTS) as path:
        results.save(str(path))
    with whole_file(folder / INPUTS) as path:
        save_json(_feeds(evidence.feeds), str(path))


def _feeds(feeds: Sequence[Mapping[str, np.ndarray]]) -> list[OrderedDict]:
    return [OrderedDict(feed) for feed in few(feeds)]
