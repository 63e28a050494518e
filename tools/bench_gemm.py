"""Times our GEMMs and HadamardQuantize side by side with ONNX Runtime's own int8 and float MatMul."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dit2deploy.artefacts.results import write_results
from dit2deploy.base.errors import Dit2DeployError
from dit2deploy.base.machine import cores, cpu_model
from dit2deploy.formats import FORMATS, Format, pack
from dit2deploy.ops import DOMAIN, GEMMS, HADAMARD_QUANTIZE, OPSET, VERSION
from dit2deploy.ops.hadamard_quantize import block_size
from dit2deploy.stages.profile.measure import METHOD, Contestant, race, ratios, statistics
from dit2deploy.stages.profile.roofline import peaks
from dit2deploy.stages.profile.summary import RATIO_COLUMNS, Column, table
from dit2deploy.targets import kernel
from dit2deploy.targets.ort import open_session

SHAPES = ((1152, 4608), (1152, 3456), (1152, 1152), (4608, 1152))  # (K, N) of fc1, qkv, proj, fc2
# Activation widths to time with the weights; "from float" takes the first.
BITS = {"ternary": (4, 2, 3, 6, 8), "int3": (4, 3), "int4": (4, 8), "int8": (8, 4)}
OWN = "ternary A4"  # what the other widths of ternary are compared with as well
EXAMPLE = """example:
  python tools/bench_gemm.py --quick
  python tools/bench_gemm.py --tokens 256 --tokens 512 --out tools/results/bench_gemm.json

A ratio is the baseline's time over ours, taken within each round: above 1 ours is faster. The GEMMs take integers and
give float32 (scales and bias included); MatMulInteger gives int32 and leaves the rest to further nodes. The rows
"from float" include quantizing the activations on both sides, ours with a Hadamard rotation."""


def node(op, inputs: list[str], outputs: list[str], **attributes: int | str) -> onnx.NodeProto:
    return helper.make_node(op.name, inputs, outputs, domain=DOMAIN, **op.node_attributes(attributes))


def model(nodes: list[onnx.NodeProto], inputs: dict[str, np.ndarray], constants: dict[str, np.ndarray]) -> bytes:
    """A model whose last node's first output is the result."""
    ports = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in inputs.items()
    ]
    output = TensorProto.INT32 if nodes[-1].op_type == "MatMulInteger" else TensorProto.FLOAT
    if nodes[-1].op_type == HADAMARD_QUANTIZE.name:
        output = TensorProto.INT8
    graph = helper.make_graph(
        nodes,
        "bench",
        ports,
        [helper.make_tensor_value_info(nodes[-1].output[0], output, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


class Bench:
    """Sessions of one shape and thread count; contestants by name."""

    def __init__(self, folder: Path, m: int, k: int, n: int, threads: int) -> None:
        self.folder, self.m, self.k, self.n, self.threads = folder, m, k, n, threads
        self.random = np.random.default_rng(0)
        self.x = self.random.standard_normal((m, k), dtype=np.float32)
        self.weight = self.random.standard_normal((k, n), dtype=np.float32)

    def contestant(self, name: str, content: bytes, inputs: dict[str, np.ndarray]) -> Contestant:
        path = self.folder / f"{name}.onnx"
        path.write_bytes(content)
        runner = open_session(path, threads=self.threads, library=kernel.library_path(), prepack=True)
        output = runner.session.get_outputs()[0].name
        return Contestant(name, name, lambda: runner.session.run([output], inputs))

    def gemm(self, fmt: Format, bits: int, *, from_float: bool = False) -> Contestant:
        codes = self.random.integers(fmt.low, fmt.high, (self.n, self.k), endpoint=True)
        constants = {
            "w": kernel.relayout(fmt.name, pack(codes, fmt), self.k),
            "ws": np.full((self.n, 1), 0.01, np.float32),
            "bias": np.zeros(self.n, np.float32),
        }
        gemm = node(GEMMS[fmt.name], ["q", "s", "w", "ws", "bias"], ["y"], bits=bits, layout=1)
        if from_float:
            constants["qmax"] = np.array([2.0 ** (bits - 1) - 1], np.float32)
            quantize = node(HADAMARD_QUANTIZE, ["x", "qmax"], ["q", "s"], block=min(block_size(self.k), 512))
            inputs = {"x": self.x}
            return self.contestant(f"{fmt.name} A{bits} from float", model([quantize, gemm], inputs, constants), inputs)
        largest = 2 ** (bits - 1) - 1
        inputs = {
            "q": self.random.integers(-largest, largest, (self.m, self.k), endpoint=True).astype(np.int8),
            "s": np.full((self.m, 1), 0.1, np.float32),
        }
        return self.contestant(f"{fmt.name} A{bits}", model([gemm], inputs, constants), inputs)

    def integers(self, dtype: type) -> Contestant:
        """u8 x s8 is what quantize_dynamic emits; without VNNI its sums saturate. u8 x u8 is exact everywhere."""
        inputs = {"a": self.random.integers(0, 255, (self.m, self.k), endpoint=True).astype(np.uint8)}
        constants = {"b": self.random.integers(0, 127, (self.k, self.n), endpoint=True).astype(dtype)}
        matmul = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
        name = "ORT MatMulInteger u8 x " + ("u8" if dtype is np.uint8 else "s8")
        return self.contestant(name, model([matmul], inputs, constants), inputs)

    def dynamic(self) -> Contestant:
        """What quantize_dynamic makes of a MatMul; ONNX Runtime fuses it to one kernel."""
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "scale", "zero"]),
            helper.make_node("MatMulInteger", ["a", "b", "zero", "b_zero"], ["sum"]),
            helper.make_node("Cast", ["sum"], ["float_sum"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["scale", "b_scale"], ["scales"]),
            helper.make_node("Mul", ["float_sum", "scales"], ["y"]),
        ]
        constants = {
            "b": self.random.integers(-127, 127, (self.k, self.n), endpoint=True).astype(np.int8),
            "b_zero": np.zeros((), np.int8),
            "b_scale": np.array(0.01, np.float32),
        }
        return self.contestant("ORT dynamic int8", model(nodes, {"x": self.x}, constants), {"x": self.x})

    def float(self) -> Contestant:
        matmul = helper.make_node("MatMul", ["x", "b"], ["y"])
        return self.contestant("ORT fp32", model([matmul], {"x": self.x}, {"b": self.weight}), {"x": self.x})

    def quantize(self) -> Contestant:
        inputs, constants = {"x": self.x}, {"qmax": np.array([7], np.float32)}
        quantize = node(HADAMARD_QUANTIZE, ["x", "qmax"], ["q", "s"], block=min(block_size(self.k), 512))
        return self.contestant("HadamardQuantize", model([quantize], inputs, constants), inputs)

    def copy(self) -> Contestant:
        to = np.empty_like(self.x)
        return Contestant("memcpy of x", "memcpy", lambda: np.copyto(to, self.x))


def races(bench: Bench) -> Iterator[tuple[list[Contestant], list[Contestant], Callable[[str], int]]]:
    """(ours, baselines, bytes of ours by name), compared within one race; ours may be a baseline, too: OWN."""
    m, k, n = bench.m, bench.k, bench.n

    def bytes_of(name: str) -> int:
        fmt = next(fmt for fmt in FORMATS if name.startswith(fmt.name))
        width = 2.0 if fmt.name == "ternary" else fmt.bits  # in the kernels' layout
        return int(n * k * width / 8) + m * k * (4 if "float" in name else 1) + 4 * m * n

    yield (
        [bench.gemm(fmt, bits) for fmt in FORMATS for bits in BITS[fmt.name]],
        [bench.integers(np.int8), bench.integers(np.uint8), bench.float()],
        bytes_of,
    )
    yield (
        [bench.gemm(fmt, BITS[fmt.name][0], from_float=True) for fmt in FORMATS],
        [bench.dynamic(), bench.float()],
        bytes_of,
    )
    yield [bench.quantize()], [bench.copy()], lambda name: 5 * m * k


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    machine = {threads: peaks(threads) for threads in options.threads}
    settings = [(threads, m, k, n) for threads in options.threads for m in options.tokens for k, n in options.shapes]
    seconds = options.seconds / (3 * len(settings))
    for threads, m, k, n in settings:
        with TemporaryDirectory(prefix="dit2deploy-") as folder:
            for ours, baselines, bytes_of in races(Bench(Path(folder), m, k, n, threads)):
                times = race([*ours, *baselines], rounds=options.runs, seconds=seconds)
                for one in ours:
                    others = [baseline.name for baseline in baselines]
                    if one.name.startswith("ternary A") and one.name != OWN and OWN in times:
                        others.append(OWN)
                    found = ratios({name: times[name] for name in (one.name, *others)}, one.name)
                    p50 = statistics(times[one.name], batch=1)["p50_ms"]
                    macs = 0 if one.name == "HadamardQuantize" else m * k * n
                    for baseline, ratio in found.items():
                        other = statistics(times[baseline], batch=1)["p50_ms"]
                        rows.append(
                            {
                                "name": one.name,
                                "baseline": baseline,
                                **ratio,
                                "threads": threads,
                                "shape": [m, k, n],
                                "ms": p50,
                                "baseline_ms": other,
                                "gmacs": macs / p50 / 1e6,
                                "baseline_gmacs": macs / other / 1e6,
                                "macs": macs,
                                "bytes": bytes_of(one.name),
                                "peak_share": macs / p50 * 1e3 / machine[threads].macs_per_second,
                                "runs": len(times[one.name]),
                            }
                        )
    return rows, {str(threads): vars(found) for threads, found in machine.items()}


COLUMNS: dict[str, Column] = {
    "ours": lambda row: row["name"],
    "against": lambda row: row["baseline"],
    "threads": lambda row: str(row["threads"]),
    "M x K x N": lambda row: " x ".join(map(str, row["shape"])),
    "ms": lambda row: f"{row['ms']:.3f}",
    "GMAC/s": lambda row: f"{row['gmacs']:.0f}" if row["macs"] else "-",
    "of peak": lambda row: f"{row['peak_share']:.0%}" if row["macs"] else "-",
    **RATIO_COLUMNS,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, action="append", help="M; may be given several times; default: 256")
    parser.add_argument("--threads", type=int, action="append", help="may be given several times; default: 1 and all")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=240.0, help="for all races together; default: 240")
    parser.add_argument("--quick", action="store_true", help="fc1 only, all cores only; within 45 seconds")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--out", type=Path, help="also write the result file, e.g. tools/results/bench_gemm.json")
    options = parser.parse_args()
    options.tokens = options.tokens or [256]
    options.threads = options.threads or ([cores()] if options.quick else sorted({1, cores()}))
    options.shapes = SHAPES[:1] if options.quick else SHAPES
    options.seconds = min(options.seconds, 20.0) if options.quick else options.seconds
    load = os.getloadavg()[0]
    try:
        isa = kernel.isa_in_use()
        rows, machine = measure(options)
    except Dit2DeployError as error:
        print(f"error: {error.cause}\n  -> {error.cure}", file=sys.stderr)
        return error.exit_code
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print(f"{cpu_model()}, kernels for {isa}\n{table(rows, COLUMNS)}")
    if options.out:
        record = {"method": METHOD, "isa": isa, "load_before": load, "peaks": machine, "rows": rows}
        write_results(options.out, "bench_gemm", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
