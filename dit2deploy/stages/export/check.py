"""What every exported file must pass: the checker, no float64, and PyTorch's results at two sizes by bodies alone."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

from dit2deploy.artefacts.onnx_model import Form
from dit2deploy.base.errors import Failed
from dit2deploy.base.progress import track
from dit2deploy.evaluate.fidelity import sqnr_db
from dit2deploy.models.family import Inputs
from dit2deploy.stages.export.trace import OUTPUT
from dit2deploy.targets.ort import open_session

LARGEST = 1_000_000_000  # weights: above it, PyTorch's side of the comparison would not be a check but a job
UNPACKED = 8  # bytes a weight that running the bodies takes: 9.2 GB for 1.3 B weights of FLUX's width
# A float graph differs by rounding only. In a quantized one values at ties are rounded the other way, which spreads:
# the runtimes' sines of FLUX's guidance (3500) differ enough to leave 46 dB in its tiny model; others gave 78 to 137.
# A wrong scale or order of channels gives below 10 dB.
LEAST_DB: dict[Form, float] = {"float": 80.0, "fused": 25.0, "qdq": 25.0}
# In a deep model with few bits they spread over everything (28 random blocks of DiT-XL/2 with 4-bit inputs keep 15 dB);
# so they do in PyTorch when inputs move by a rounding error, and the file, whose every layer rounds otherwise, may
# differ by as much and MARGIN_DB more (those 28 blocks on a CPU with AVX-512: 19 dB against themselves, 15 the file).
WORST_DB = {"float": 80.0, "fused": 10.0, "qdq": 10.0}
MARGIN_DB = 6.0
NUDGE = 2.0**-22  # of a float input's value: about what another order of sums does


def check_no_double(model: ir.Model) -> None:
    """Failed where the graph computes in float64, which older runtimes and TensorRT refuse."""
    for node in model.graph:
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.dtype == ir.DataType.DOUBLE:
                raise Failed(f"{value.name} of node {node.name} is float64.", "Swap it in the family's description.")


def check_file(path: Path) -> None:
    """The ONNX checker in full mode."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Failed(f"{path.name}: is not valid ONNX: {error}", "Report it with the model's config.json.") from error


def check_results(path: Path, module: Callable[..., tuple], calls: Mapping[str, Inputs], form: Form) -> None:
    """Runs the file by its function bodies in plain ONNX Runtime and compares it with the module, call by call.

    Raises Failed for a file that does not load or run, and below LEAST_DB[form] of SQNR; a model that is as far from
    itself when its inputs are nudged may be as far as that.
    """
    runner = open_session(path, optimize=False)
    for what, inputs in track(list(calls.items()), "export: check"):
        got = runner.run({name: value.numpy() for name, value in inputs.items()})[OUTPUT]
        want = _asked(module, inputs)
        least = LEAST_DB[form]
        if got.shape == want.shape and sqnr_db(want, got) < least:
            least = min(least, max(WORST_DB[form], _nudged_db(module, inputs, want) - MARGIN_DB))
        _compare(what, want, got, least)


def _asked(module: Callable[..., tuple], inputs: Inputs) -> np.ndarray:
    with torch.no_grad():
        return module(**inputs, return_dict=False)[0].numpy()


def _nudged_db(module: Callable[..., tuple], inputs: Inputs, want: np.ndarray) -> float:
    """SQNR of the module against itself with every float input moved by a rounding error."""
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: value * (1 + NUDGE * (2 * torch.rand(value.shape, generator=generator) - 1))
        if value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    return sqnr_db(want, _asked(module, moved))


def _compare(what: str, want: np.ndarray, got: np.ndarray, least: float) -> None:
    if want.shape != got.shape:
        raise Failed(f"The exported file gives {list(got.shape)} at {what}, PyTorch {list(want.shape)}.")
    measured = sqnr_db(want, got)
    if not measured >= least:
        raise Failed(f"The exported file differs from PyTorch at {what}: {measured:.1f} dB, {least:.0f} dB are needed.")
