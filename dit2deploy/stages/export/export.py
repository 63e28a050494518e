"""Lowers a model to ONNX: one way for all sizes, from fake weights, which get their values when they are written."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.artefacts.onnx_model import (
    CONFIG,
    DATA,
    MANIFEST,
    MODEL,
    SCHEDULER,
    AxisRecord,
    Form,
    LayerRecord,
    OnnxManifest,
    OnnxModel,
    PortRecord,
    Size,
    graph_file,
)
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import whole_folder, write_json
from dit2deploy.base.machine import versions
from dit2deploy.base.memory import require
from dit2deploy.base.progress import note, report
from dit2deploy.base.shown import gigabytes
from dit2deploy.models import Family
from dit2deploy.models import load as models
from dit2deploy.models.family import Inputs, at_size
from dit2deploy.models.stream import largest_layer, own_tensors
from dit2deploy.nn import convert
from dit2deploy.nn.quant_linear import QuantForm, QuantLinear
from dit2deploy.ops import OPSET, VERSION
from dit2deploy.stages.export import check
from dit2deploy.stages.export.attach import Read, attach_weights, is_weight
from dit2deploy.stages.export.bodies import add_bodies
from dit2deploy.stages.export.fuse.activation import fuse_activation
from dit2deploy.stages.export.fuse.ada_ln import fuse_ada_ln
from dit2deploy.stages.export.fuse.residual import fuse_residual
from dit2deploy.stages.export.fuse.shared_input import share_input
from dit2deploy.stages.export.layers import LayerOutput, name_layer_outputs
from dit2deploy.stages.export.merge import merge_equal
from dit2deploy.stages.export.passes import simplify, tidy
from dit2deploy.stages.export.strip import strip_metadata
from dit2deploy.stages.export.trace import trace
from dit2deploy.targets.graph import save_streamed, share_weights

IR_VERSION = 10  # the newest that ONNX Runtime 1.18 reads
_SEED = 0
_MODULE = 1 << 19  # bytes that tracing takes for each module: FLUX.1 has 1300 and takes 560 MB (scale.md)


def export(
    checkpoint: Path,
    out: Path,
    *,
    form: QuantForm = "fused",
    sizes: Sequence[Size] = (),
    max_memory: int | None = None,
) -> OnnxModel:
    """Lowers a quantized checkpoint into the folder `out`: model.onnx, its data, manifest, config, scheduler.

    Form "fused": HadamardQuantize (AdaLnHadamardQuantize behind a modulated norm, ActivationHadamardQuantize behind a
    GELU or SiLU, GatedActivationHadamardQuantize behind a SwiGLU) and one <Format>Gemm for all layers of a block that
    share an input, with gate and residual where they follow. Form "qdq": custom QDQ and Hadamard ops around plain
    MatMuls. Both run in any ONNX runtime by their function bodies.
    Weights are never in memory but one by one; `max_memory` is what the process may own, in bytes (None: what the
    machine has free). Where a graph fixes the size of the latents, `sizes` (height, width) asks for graphs of others
    beside the config's own, over one data file.

    Raises Misuse for a checkpoint that is broken or whose family's inputs are unknown, for sizes that the model cannot
    have or that one graph serves anyway, and for a ceiling that cannot be kept, Failed where the model cannot be traced
    or a file does not compute what PyTorch does; nothing is left behind then.
    """
    if form not in ("fused", "qdq"):
        raise Misuse(f"There is no form {form!r} of a quantized model.", 'Take "fused" or "qdq".')
    source = Checkpoint.load(Path(checkpoint))
    family = models.known_family(source.config["_class_name"], source.folder / CONFIG)
    module = convert.empty_quantized(source.config, source.policy, form=form)
    convert.check_fits(module, source)
    keep = require(f"export: the graph of {family.class_name}", _graph_bytes(module), max_memory)
    empty = partial(convert.empty_quantized, source.config, source.policy, form=form)
    others = {size: _resized(empty(), family, size) for size in _other_sizes(sizes, family, module)}
    with whole_folder(Path(out), replaces=schema.holds(OnnxManifest, MANIFEST)) as folder:
        weights = source.tensors.read, _dtypes(source.tensors)
        graph, layers = _lower(module, family, *weights, form=form)
        _write(graph, folder)
        if comparable := _is_comparable(module, keep // 2):
            quantized = convert.load_quantized(source, form=form, keep=keep // 2)
            check.check_results(folder / MODEL, quantized, _calls(family, module), form)
        for size, other in others.items():
            _write_beside(graph, _lower(other, family, *weights, form=form, size=size)[0], folder, size)
            if comparable:
                check.check_results(folder / graph_file(size), quantized, _calls(family, module, size), form)
        manifest = _manifest(graph, layers, family, form=form, checkpoint=source.folder, digest=source.sha256)
        manifest = manifest.model_copy(update={"sizes": tuple(others), "axes": _axes(family, module)})
        _write_records(folder, manifest, source.config, source.scheduler_config)
    return OnnxModel.load(Path(out))


def _other_sizes(sizes: Sequence[Size], family: Family, module: torch.nn.Module) -> tuple[Size, ...]:
    """Those that are not the config's own, each once; raises as `export` does."""
    own = family.latent_shape(module.config)[-2:] if family.latent_shape else None
    return tuple(size for size in dict.fromkeys(sizes) if size != own)


def _resized(module: torch.nn.Module, family: Family, size: Size) -> torch.nn.Module:
    if family.resize is None:
        raise Misuse(f"{family.class_name}: one graph serves all sizes of its family.", "Leave --size out.")
    family.resize(module, size)
    return module


def export_float(model: Path, out: Path, *, max_memory: int | None = None) -> OnnxModel:
    """Lowers the full-precision model in float32 into the folder `out`: the baseline. Raises as `export` does."""
    source = models.open_model(Path(model))
    with models.fake_parameters():
        module = models.build(source.config, source.folder / CONFIG)
    models.check_fits(module, source)
    keep = require(f"export: the graph of {source.class_name}", _graph_bytes(module), max_memory)

    def read(name: str) -> np.ndarray:
        return source.tensors.read(name).astype(np.float32)

    with whole_folder(Path(out), replaces=schema.holds(OnnxManifest, MANIFEST)) as folder:
        # Everything is said to be float32, so that the file holds it so.
        graph, layers = _lower(module, source.family, read, dict.fromkeys(source.tensors, "F32"), form="float")
        _write(graph, folder)
        if _is_comparable(module, keep // 2):
            loaded, _ = models.load_transformer(source.folder, keep=keep // 2)
            check.check_results(folder / MODEL, loaded, _calls(source.family, module), "float")
        manifest = _manifest(graph, layers, source.family, form="float", checkpoint=source.folder, digest=source.sha256)
        _write_records(folder, manifest, source.config, source.scheduler_config)
    return OnnxModel.load(Path(out))


def _graph_bytes(module: torch.nn.Module) -> int:
    """Peak bytes of tracing and writing: nodes by the number of modules, and a tensor as read and as written."""
    return _MODULE * sum(1 for _ in module.modules()) + 3 * largest_layer(module)


def _dtypes(tensors) -> dict[str, str]:
    return {name: tensors.dtype(name) for name in tensors}


def _lower(
    module: torch.nn.Module,
    family: Family,
    read: Read,
    stored: Mapping[str, str],
    *,
    form: Form,
    size: Size | None = None,
) -> tuple[ir.Model, dict[str, LayerOutput]]:
    """The finished graph, weights not yet read, and where each quantized layer's output is; None: the config's size."""
    for assumption in family.assumptions:
        note(assumption)
    inputs = at_size(family.inputs(module.config, batch=2, seed=_SEED), size)
    family.swap(module)
    report("export: trace", 0, 1)
    model = trace(module, family, inputs, family.axes(module.config))
    report("export: trace", 1, 1)
    report("export: simplify", 0, 1)
    attach_weights(model, read, stored)
    simplify(model)
    layers = merge_equal(model, name_layer_outputs(model, convert.quantized_linears(module)))
    if form == "fused":
        layers = share_input(model, layers)
        fuse_ada_ln(model)
        fuse_activation(model)
        fuse_residual(model)
    tidy(model)
    strip_metadata(model)
    check.check_no_double(model)
    add_bodies(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "dit2deploy", versions("dit2deploy").get("dit2deploy", "")
    report("export: simplify", 1, 1)
    return model, layers


def _write(model: ir.Model, folder: Path) -> None:
    save_streamed(model, folder / MODEL)
    check.check_file(folder / MODEL)


def _write_beside(first: ir.Model, model: ir.Model, folder: Path, size: Size) -> None:
    """Writes the graph of another size over the data file of the first, whose weights it shares."""
    path = folder / graph_file(size)
    there = first.graph.initializers
    share_weights(
        model, first, [name for name, value in model.graph.initializers.items() if _same(value, there.get(name))]
    )
    save_streamed(model, path, data=folder / DATA)
    check.check_file(path)


def _same(value: ir.Value, other: ir.Value | None) -> bool:
    """Whether two initializers of one name hold the same: weights do; constants may depend on the size."""
    if other is None or is_weight(value):
        return other is not None
    return np.array_equal(value.const_value.numpy(), other.const_value.numpy())


def _is_comparable(module: torch.nn.Module, room: int) -> bool:
    """Whether the file can be run by its bodies, which unpack all weights, in that many bytes."""
    count = sum(_count(inner) for inner in module.modules())
    if count > check.LARGEST:
        note(f"not compared with PyTorch: more than {check.LARGEST:,} weights ({count:,})")
    elif (needed := check.UNPACKED * count) > room:
        note(f"not compared with PyTorch: it would take {gigabytes(needed)} of memory more")
    return count <= check.LARGEST and needed <= room


def _count(module: torch.nn.Module) -> int:
    """Weights that the module itself holds, packed or not."""
    if isinstance(module, QuantLinear):
        return module.in_features * module.out_features
    return sum(value.numel() for value in own_tensors(module).values())


def _calls(family: Family, module: torch.nn.Module, size: Size | None = None) -> dict[str, Inputs]:
    """Calls at other lengths of the dynamic axes than the traced ones."""
    calls = {
        "batch 1": family.inputs(module.config, batch=1, seed=_SEED + 1),
        "batch 3 and other sizes": family.inputs(module.config, batch=3, seed=_SEED + 2, second=True),
    }
    return {what: at_size(inputs, size) for what, inputs in calls.items()}


def _manifest(
    model: ir.Model, layers: Mapping[str, LayerOutput], family: Family, *, form: Form, checkpoint: Path, digest: str
) -> OnnxManifest:
    return OnnxManifest(
        form=form,
        model=family.class_name,
        family=family.name,
        inputs=tuple(map(_port, model.graph.inputs)),
        outputs=tuple(map(_port, model.graph.outputs)),
        layers={name: LayerRecord(output=at.value.name, begin=at.begin, end=at.end) for name, at in layers.items()},
        opset=OPSET,
        custom_opset=VERSION,
        assumptions=family.assumptions,
        versions=versions("dit2deploy", "torch", "diffusers", "onnx", "onnxscript", "onnx-ir", "onnxruntime"),
        checkpoint=str(checkpoint),
        checkpoint_sha256=digest,
    )


def _axes(family: Family, module: torch.nn.Module) -> tuple[AxisRecord, ...]:
    """The dynamic axes, each once, in the order of the inputs."""
    axes = [axis for named in family.axes(module.config).values() for axis in named.values()]
    return tuple(axis.record() for axis in dict.fromkeys(axes))


def _port(value: ir.Value) -> PortRecord:
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return PortRecord(name=value.name, dtype=value.dtype.numpy().name, shape=shape)


def _write_records(
    folder: Path, manifest: OnnxManifest, config: Mapping[str, Any], scheduler: Mapping[str, Any] | None
) -> None:
    schema.save(manifest, folder / MANIFEST)
    write_json(folder / CONFIG, dict(config))
    if scheduler is not None:
        write_json(folder / SCHEDULER, dict(scheduler))
