"""Writes an exported model as trtexec of TensorRT before 10.10 takes it: for JetPack, docs/jetson.md.

Packed weights are in the order of the CUDA kernels, codes of up to 4 bits lie two a byte, and the bodies of the ops
that have a plugin are gone: those TensorRTs prefer a body to a plugin, and would run dense weights without a word.
"""

import argparse
import sys
from pathlib import Path

import onnx_ir as ir

from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.base.errors import Dit2DeployError, Misuse
from dit2deploy.targets import kernel
from dit2deploy.targets.graph import drop_native_bodies, pack_codes, save_streamed, use_kernel_layout
from dit2deploy.targets.trt_build import check_form
from dit2deploy.targets.trt_profile import profile_of

SHAPES = {"minShapes": "least", "optShapes": "usual", "maxShapes": "most"}

EXAMPLE = """example:
  python tools/trtexec_onnx.py build/demo.work/onnx build/jetson   # writes the model, prints its options"""


def shapes(onnx: OnnxModel, which: str) -> str:
    """Of all inputs at the "least", "usual" or "most" lengths of dynamic axes, as trtexec's options want them."""
    profile = profile_of(onnx, {})

    def length(dim: int | str) -> int:
        return getattr(profile[dim], which) if isinstance(dim, str) else dim

    return ",".join(f"{port.name}:{'x'.join(str(length(dim)) for dim in port.shape)}" for port in onnx.manifest.inputs)


def write(onnx: OnnxModel, out: Path) -> Path:
    """The path of the model, at the size of its inputs.

    Raises Misuse for one that is not of the fused form, or where `out` holds one already.
    """
    check_form(onnx, "tensorrt")
    path = out / "model.onnx"
    if path.exists():
        raise Misuse(f"{path} is already there.", "Name another folder, or remove it.")
    out.mkdir(parents=True, exist_ok=True)
    model = ir.load(onnx.path)
    use_kernel_layout(model, kernel.FRAGMENT_ORDER)
    pack_codes(model)
    drop_native_bodies(model)
    save_streamed(model, path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("onnx", type=Path, help="folder of `dit2deploy export --form fused`")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    try:
        onnx = OnnxModel.load(options.onnx)
        path = write(onnx, options.out)
    except Dit2DeployError as error:
        print(f"error: {error.cause}\n  -> {error.cure}", file=sys.stderr)
        return error.exit_code
    print(f"--onnx={path}")
    for name, which in SHAPES.items():
        print(f"--{name}={shapes(onnx, which)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
