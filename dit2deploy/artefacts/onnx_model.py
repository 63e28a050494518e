"""The lowered model: model.onnx, one external data file, and what later stages must know of it.

Where a graph fixes the size of the latents, there may be others beside it, model.HEIGHTxWIDTH.onnx, over the same data.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit2deploy.artefacts import schema
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import read_json

MANIFEST = "manifest.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"
CONFIG = "config.json"
SCHEDULER = "scheduler/scheduler_config.json"
_CURE = "Make it anew with `dit2deploy export`."

Form = Literal["fused", "qdq", "float"]


Size = tuple[int, int]  # height and width of the latents
BATCH = "batch"  # the dynamic axis of samples
OWN = "onnx"  # the label of the graph for the size of the manifest's inputs


def size_label(size: Size) -> str:
    """How a size is written: in options, names of files, and labels of engines."""
    return f"{size[0]}x{size[1]}"


def graph_file(size: Size) -> str:
    """The name of the ONNX file of another size than that of MODEL."""
    return f"model.{size_label(size)}.onnx"


class PortRecord(schema.Record):
    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]  # a string: a dynamic axis of that name


class AxisRecord(schema.Record):
    """A dynamic axis, and the lengths that an engine for a range of them takes: all multiples of `multiple`."""

    name: str
    least: int
    usual: int
    most: int
    multiple: int = 1
    bound: int | None = None  # the model itself takes no more


class LayerRecord(schema.Record):
    """Where the output of a quantized layer is: value `output`, channels begin:end of its last axis."""

    output: str
    begin: int
    end: int


class OnnxManifest(schema.Record):
    schema_version: Literal[1] = 1
    kind: Literal["onnx_model"] = "onnx_model"
    form: Form
    model: str  # class name of the transformer
    family: str
    checkpoint: str  # folder, provenance
    checkpoint_sha256: str
    inputs: tuple[PortRecord, ...]
    outputs: tuple[PortRecord, ...]
    layers: dict[str, LayerRecord]  # quantized layers in execution order
    opset: int
    custom_opset: int
    sizes: tuple[Size, ...] = ()  # beside that of the inputs: each has its own graph
    axes: tuple[AxisRecord, ...] = ()  # the dynamic ones
    assumptions: tuple[str, ...] = ()
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class OnnxModel:
    folder: Path
    manifest: OnnxManifest

    @property
    def path(self) -> Path:
        return self.folder / MODEL

    @property
    def graphs(self) -> dict[str, str]:
        """Names of the ONNX files, that of the inputs' own size first, by the label of their engine."""
        return {OWN: MODEL} | {size_label(size): graph_file(size) for size in self.manifest.sizes}

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / CONFIG, cure=_CURE)

    @property
    def scheduler_config(self) -> dict[str, Any] | None:
        path = self.folder / SCHEDULER
        return read_json(path) if path.exists() else None

    @classmethod
    def load(cls, folder: Path) -> "OnnxModel":
        """Raises Misuse for a model that is missing, broken or of a newer schema."""
        manifest = schema.load(OnnxManifest, folder / MANIFEST, cure=_CURE)
        made = cls(folder, manifest)
        for name in (*made.graphs.values(), DATA, CONFIG):
            if not (folder / name).is_file():
                raise Misuse(f"{folder / name}: no such file.", _CURE)
        return made
