"""The optimization profile of TensorRT engines: which lengths of its dynamic axes an engine is built for."""

from collections.abc import Mapping, Sequence

import numpy as np

from dit2deploy.artefacts.onnx_model import BATCH, AxisRecord, OnnxModel, PortRecord
from dit2deploy.base.errors import Misuse

Profile = Mapping[str, AxisRecord]  # by the axis's name
_BATCH = AxisRecord(name=BATCH, least=1, usual=2, most=16)  # of models whose manifest tells nothing of it


def profile_of(onnx: OnnxModel, ranges: Mapping[str, Sequence[int]]) -> dict[str, AxisRecord]:
    """Least, usual and most length of each dynamic axis: of `ranges` by its name, else what the model's manifest tells.

    TensorRT tunes for the usual length and reserves for the most. Raises Misuse for a range that is none, of an axis
    that the model does not have, and for an axis whose range nobody tells.
    """
    known = {_BATCH.name: _BATCH} | {axis.name: axis for axis in onnx.manifest.axes}
    names = dict.fromkeys(dim for port in onnx.manifest.inputs for dim in port.shape if isinstance(dim, str))
    for name in ranges:
        if name not in names:
            there = ", ".join(names) or "none"
            raise Misuse(f"{onnx.folder}: has no dynamic axis {name!r} (there: {there}).", "Leave its --range out.")
    made = {}
    for name in names:
        if name in ranges:
            made[name] = _asked(known.get(name, AxisRecord(name=name, least=1, usual=1, most=1)), ranges[name])
        elif name in known:
            made[name] = known[name]
        else:
            raise Misuse(
                f"{onnx.folder}: its manifest tells no lengths of the dynamic axis {name}.",
                f"Export it anew, or build with `--range {name}=LEAST:USUAL:MOST`.",
            )
    return made


def _asked(axis: AxisRecord, lengths: Sequence[int]) -> AxisRecord:
    """The axis with these lengths."""
    told = f"the range {':'.join(map(str, lengths))} of {axis.name}"
    multiples = f"multiples of {axis.multiple}" if axis.multiple > 1 else "lengths"
    cure = f"Give three {multiples} that do not fall: `--range {axis.name}=LEAST:USUAL:MOST`."
    if len(lengths) != 3 or not 0 < lengths[0] <= lengths[1] <= lengths[2] or any(n % axis.multiple for n in lengths):
        raise Misuse(f"{told} is none.", cure)
    if axis.bound is not None and lengths[2] > axis.bound:
        raise Misuse(f"{told} passes {axis.bound}, the most that the model takes.", cure)
    return axis.model_copy(update=dict(zip(("least", "usual", "most"), lengths, strict=True)))


def ranges_of(profile: Profile, ports: Sequence[PortRecord]) -> dict[str, list[tuple[int, int, int]]]:
    """(least, usual, most) of the dynamic axes of each input, in their order."""
    return {port.name: [_lengths(profile[dim]) for dim in port.shape if isinstance(dim, str)] for port in ports}


def _lengths(axis: AxisRecord) -> tuple[int, int, int]:
    return axis.least, axis.usual, axis.most


def check_inputs(profile: Profile, ports: Sequence[PortRecord], inputs: Mapping[str, np.ndarray]) -> None:
    """Raises Misuse for an input whose dynamic axes the engine was not built for, or that two inputs disagree on."""
    found: dict[str, tuple[int, str]] = {}
    for port in ports:
        shape = inputs[port.name].shape
        for dim, length in zip(port.shape, shape, strict=False):
            if not isinstance(dim, str) or dim not in profile:
                continue
            _check_length(profile[dim], port.name, length)
            before, name = found.setdefault(dim, (length, port.name))
            if before != length:
                raise Misuse(
                    f"the engine refused the inputs: {dim} is {before} in {name} and {length} in {port.name}.",
                    "Make them equal.",
                )


def _check_length(axis: AxisRecord, port: str, length: int) -> None:
    fault = f"the engine refused the inputs: {axis.name} of {port} is {length}"
    if length % axis.multiple:
        raise Misuse(f"{fault}, no multiple of {axis.multiple}.", "Take one that is.")
    if not axis.least <= length <= axis.most:
        least, most = min(length, axis.least), max(length, axis.most)
        raise Misuse(
            f"{fault}; it is built for {axis.least} to {axis.most}.",
            f"Build it anew with `--range {axis.name}={least}:{axis.usual}:{most}`.",
        )
