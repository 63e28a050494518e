"""What the targets ort-cpu and ort-cuda share: when they can work, and what they write: graphs of custom ops,
weights in their kernels' order, the library."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from dit2deploy.artefacts.bundle import TargetRecord
from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.targets import kernel
from dit2deploy.targets.float_types import FLOAT32, name_halves, thresholds_of, use_half_activations
from dit2deploy.targets.graph import (
    drop_native_bodies,
    pack_codes,
    packed_quantizers,
    save_graphs,
    use_kernel_layout,
)
from dit2deploy.targets.ort_attention import use_fused_attention
from dit2deploy.targets.reference import record
from dit2deploy.targets.target import Availability


def availability(find_runtime: Callable[[], object]) -> Availability:
    """Building takes the kernel library; running takes what `find_runtime` finds, or raises Misuse for."""
    try:
        kernel.describe()
    except Misuse as error:
        return Availability(can_build=False, can_run=False, reason=error.cause, cure=error.cure)
    try:
        find_runtime()
    except Misuse as error:
        return Availability(can_build=True, can_run=False, reason=error.cause, cure=error.cure)
    return Availability(can_build=True, can_run=True)


def build_custom_ops(
    onnx: OnnxModel, *, root: Path, target: str, layout: int, floats: str = FLOAT32
) -> tuple[TargetRecord, ir.Model]:
    """Rewrites packed weights into `layout`, packs codes of activations where that is a GPU's, drops the bodies of ops
    that have kernels, takes the runtime's own attention, makes activations `floats` (float32 or float16), adds the
    library; gives what was written and the first graph.

    Raises Misuse for a model that is not of the fused form.
    """
    if onnx.manifest.form != "fused":
        raise Misuse(
            f"{onnx.folder}: target {target} takes the fused form, this is {onnx.manifest.form}.",
            "Export with `--form fused`.",
        )

    def prepare(model: ir.Model) -> None:
        use_kernel_layout(model, layout)
        if layout == kernel.FRAGMENT_ORDER:  # the GPU's kernels alone read packed codes
            pack_codes(model)
        drop_native_bodies(model)
        use_fused_attention(model)
        if floats != FLOAT32:
            use_half_activations(model, floats)
            name_halves(model)

    folder = root / target
    folder.mkdir(exist_ok=True)
    model = save_graphs(onnx, folder, prepare)
    library = folder / kernel.LIBRARY_NAME
    shutil.copyfile(kernel.library_path(), library)
    made = record(onnx, model, folder, root=root, extra=(library,))
    details = {
        **made.details,
        "library_bytes": library.stat().st_size,
        "layout": layout,
        "floats": floats,
        "packed_quantizers": packed_quantizers(model),
    }
    return made.model_copy(update={"details": details, "thresholds": thresholds_of(floats)}), model
