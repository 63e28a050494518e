"""measure_ops(): the time of each linear of a model on this device, for a search whose budget is in milliseconds."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.device_table import DeviceTable, Linear, LinearTime, as_run
from dit2deploy.artefacts.policy import LayerPolicy, Policy, Weight
from dit2deploy.base.disk import scratch_folder
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_file
from dit2deploy.base.machine import cores, cpu_model, versions
from dit2deploy.base.progress import note, report
from dit2deploy.formats import by_name, pack
from dit2deploy.models.load import CONFIG, ModelFolder, build, fake_parameters, linears_of, open_model
from dit2deploy.nn.units import Unit, units_of
from dit2deploy.ops import DOMAIN, GEMMS, HADAMARD_QUANTIZE, LOW_RANK_GEMMS, MONARCH_ADD, OPSET, VERSION, Op
from dit2deploy.stages.profile.measure import METHOD, Contestant, race
from dit2deploy.targets import kernel
from dit2deploy.targets.ort import OrtRunner, open_session

TARGET = "ort-cpu"
BITS = (2, 3, 4, 5, 6, 8)


def measure_ops(
    model: Path,
    policy: Policy,
    out: Path,
    *,
    calibration: CalibrationSet | None = None,
    weights: Sequence[Weight] = (),
    bits: Sequence[int] = BITS,
    device: str | None = None,
    threads: int | None = None,
    batch: int = 1,
    rounds: int = 20,
) -> DeviceTable:
    """Times the linears of `model` as `policy` has them and writes the device table to the file `out`.

    Block linears are timed with all of the weight formats `weights` (default: the policy's own) and of the activation
    widths `bits`; layers around the blocks as the policy has them. Each is a model of its own for ONNX Runtime with our
    kernels, of the nodes that the fused form has for it: HadamardQuantize, the branch's MatMul, the GEMM; layers that
    read one input run as one. A modulated norm or an activation that the fused form computes in the quantizer's pass is
    left out: it is there whatever format and width are chosen, and so is part of no price. Those of equal size take
    turns, so that they compare. Token counts are those of a call of `calibration`, else of the family's example call:
    give a set where the number of tokens is not fixed by the model.

    A table that is there is extended by what it lacks. Raises Misuse for a policy of another model, and for a table of
    another device, library, runtime, thread count or batch.
    """
    model, out = Path(model), Path(out)
    source = open_model(model)
    if batch < 1 or rounds < 1 or min(bits, default=0) < 2 or max(bits, default=9) > 8:
        raise Misuse("measure-ops: batch and rounds are at least 1, bits 2 .. 8.", "Leave them out for the defaults.")
    shapes, units = _units(source, calibration)
    policy.check_covers(source.class_name, shapes)
    table = _begun(out, device=device, threads=threads or cores(), batch=batch)
    missing = [
        linear
        for linear in _wanted(source, policy, shapes, units, weights=weights, bits=bits, batch=batch)
        if linear not in table
    ]
    by_size: dict[tuple[int, int, int], list[Linear]] = {}
    for linear in missing:
        by_size.setdefault((linear.n, linear.k, linear.rows), []).append(linear)
    if table.times and missing:
        note(f"measure-ops: {out} holds {len(table.times)} times; {len(missing)} more are measured")
    report("measure-ops", 0, len(missing) or 1)
    done = 0
    for same in by_size.values():
        table = table.extended(_timed(same, threads=table.threads, rounds=rounds))
        table.save(out)  # a killed run goes on from here
        done += len(same)
        report("measure-ops", done, len(missing))
    if not missing:
        table.save(out)
        report("measure-ops", 1, 1)
    return table


def _units(source: ModelFolder, calibration: CalibrationSet | None) -> tuple[dict[str, tuple[int, int]], list[Unit]]:
    """(N, K) and units of all linears, by a call with fake tensors: no weights are read, nothing is computed."""
    with fake_parameters() as mode:
        module = build(source.config, source.folder / CONFIG)
    shapes = linears_of(module)
    if calibration is None:
        inputs = source.family.inputs(module.config, batch=1, seed=0)
    else:
        inputs = {name: torch.from_numpy(value) for name, value in calibration.call(0).items()}
    with mode:
        return shapes, units_of(module, list(shapes), inputs)


def _wanted(
    source: ModelFolder,
    policy: Policy,
    shapes: Mapping[str, tuple[int, int]],
    units: Sequence[Unit],
    *,
    weights: Sequence[Weight],
    bits: Sequence[int],
    batch: int,
) -> list[Linear]:
    """Each distinct linear once, in the model's order."""
    found: dict[Linear, None] = {}
    for unit in units:
        layers = {name: policy.layers[name] for name in unit.layers}
        searched = all(source.family.role(name) == "block" and layer.is_quantized for name, layer in layers.items())
        for changed in [layers, *(_variants(layers, weights, bits) if searched else ())]:
            groups = max(len(layer.activation_bits) for layer in changed.values()) or 1
            for group in range(groups):
                found |= dict.fromkeys(as_run(changed, shapes, unit.rows * batch, group=group))
    return list(found)


def _variants(
    layers: Mapping[str, LayerPolicy], weights: Sequence[Weight], bits: Sequence[int]
) -> Iterator[dict[str, LayerPolicy]]:
    """Widths are those of the codes, whatever grid a search gives them: a mid-rise one of b bits has codes of b + 1."""
    for weight in weights or (None,):
        for width in bits:
            of_weight = {} if weight is None else {"weight": weight}
            changes = {"activation_bits": (width,), "grid": "mid-tread", **of_weight}
            yield {name: layer.model_copy(update=changes) for name, layer in layers.items()}


def _begun(out: Path, *, device: str | None, threads: int, batch: int) -> DeviceTable:
    """The table that lies at `out`, or an empty one; Misuse where that is of other circumstances."""
    fresh = DeviceTable(
        device=device or cpu_model(),
        target=TARGET,
        threads=threads,
        batch=batch,
        instructions=kernel.isa_in_use(),
        library_sha256=sha256_of_file(kernel.library_path()),
        versions=versions("dit2deploy", "onnxruntime"),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        method=METHOD,
    )
    if not out.exists():
        return fresh
    held = DeviceTable.load(out)
    for field in ("device", "target", "threads", "batch", "instructions", "library_sha256", "versions"):
        if getattr(held, field) != getattr(fresh, field):
            raise Misuse(
                f"{out}: is a table of {field} {getattr(held, field)}; here it is {getattr(fresh, field)}.",
                "Write to another file, or measure with the same settings.",
            )
    return held


def _timed(linears: Sequence[Linear], *, threads: int, rounds: int) -> list[LinearTime]:
    """Linears of equal size, in turns."""
    with scratch_folder() as folder, ExitStack() as stack:
        contestants = []
        for index, linear in enumerate(linears):
            path = folder / f"{index}.onnx"
            path.write_bytes(one_linear(linear).SerializeToString())
            runner = stack.enter_context(closing(open_session(path, threads=threads, library=kernel.library_path())))
            x = np.random.default_rng(0).standard_normal((linear.rows, linear.k), np.float32)
            contestants.append(Contestant(str(index), str(linear), _bound(runner, x)))
        times = race(contestants, rounds=rounds)
    return [
        LinearTime(
            linear=linear,
            ms=_rounded(np.median(times[str(index)])),
            least_ms=_rounded(min(times[str(index)])),
            rounds=len(times[str(index)]),
        )
        for index, linear in enumerate(linears)
    ]


def _bound(runner: OrtRunner, x: np.ndarray):
    return lambda: runner.run({"x": x})


def _rounded(milliseconds: float) -> float:
    return float(f"{milliseconds:.5g}")


def one_linear(linear: Linear) -> onnx.ModelProto:
    """x float32 [rows, K] -> y float32 [rows, N] with random weights, as the fused form computes it."""
    rng = np.random.default_rng(0)
    n, k, rank = linear.n, linear.k, linear.low_rank
    if linear.weight == "float":
        constants = {"w": rng.standard_normal((k, n), np.float32), "bias": np.zeros(n, np.float32)}
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ]
    else:
        fmt = by_name(linear.weight)
        codes = rng.integers(fmt.low, fmt.high, (n, k), endpoint=True)
        constants = {
            "qmax": np.array([2.0 ** (linear.bits - 1) - 1], np.float32),
            "w": kernel.relayout(fmt.name, pack(codes, fmt), k),
            "ws": np.full((n, k // (linear.group_size or k)), 0.01, np.float32),
            "bias": np.zeros(n, np.float32),
        }
        nodes = [_node(HADAMARD_QUANTIZE, ["x", "qmax"], ["q", "s"], block=linear.hadamard, clip="absmax")]
        inputs = ["q", "s", "w", "ws", "bias"]
        if rank:
            constants |= {"down": rng.standard_normal((k, rank), np.float32), "up": np.ones((n, rank), np.float32)}
            nodes.append(helper.make_node("MatMul", ["x", "down"], ["t"]))
            inputs += ["t", "up"]
        gemm = (LOW_RANK_GEMMS if rank else GEMMS)[fmt.name]
        nodes.append(_node(gemm, inputs, ["y"], bits=linear.bits, layout=kernel.KERNEL_ORDER))
        if linear.monarch:
            a, b, r = linear.monarch
            constants |= {
                "monarch_down": rng.standard_normal((k, r, b), np.float32),
                "monarch_up": rng.standard_normal((a, r, n), np.float32),
            }
            nodes[-1].output[0] = "plain"
            nodes.append(_node(MONARCH_ADD, ["plain", "x", "monarch_down", "monarch_up"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [linear.rows, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [linear.rows, n])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _node(op: Op, inputs: list[str], outputs: list[str], **attributes: int | str) -> onnx.NodeProto:
    return helper.make_node(op.name, inputs, outputs, domain=DOMAIN, **op.node_attributes(attributes))
