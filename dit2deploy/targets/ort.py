"""ONNX Runtime sessions as runners: what the targets ort-cpu, ort-cuda and reference share."""

import importlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.base.machine import cores
from dit2deploy.base.memory import give_back

OLDEST = (1, 18)
# From this version on, a model given as bytes may name the folder of its data; later versions refuse links to data.
_FOLDER_OPTION = (1, 22)
ON_CPU = "CPUExecutionProvider"
_INSTALL = "Install it: pip install onnxruntime."


def runtime() -> ModuleType:
    """The module onnxruntime; Misuse where it is missing or too old."""
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise Misuse(f"onnxruntime cannot be imported: {error}.", _INSTALL) from None
    if version(module) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise Misuse(f"onnxruntime {module.__version__} is too old: {needed} or newer is needed.", _INSTALL)
    return module


def version(module: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", module.__version__)[:2])


def errors(module: ModuleType) -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: classes of its own, which share no base but Exception."""
    own = vars(module.capi.onnxruntime_pybind11_state).values()
    return (ValueError, RuntimeError, *(kind for kind in own if isinstance(kind, type) and issubclass(kind, Exception)))


class OrtRunner:
    """A Runner over an inference session; `session` is ONNX Runtime's own object."""

    def __init__(self, session: Any, folder: tempfile.TemporaryDirectory | None = None) -> None:
        self.session = session
        self._folder = folder
        self.outputs = [port.name for port in session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises Misuse for inputs that the engine does not have, lacks or cannot take."""
        try:
            return dict(zip(self.outputs, self.session.run(self.outputs, dict(inputs)), strict=True))
        except errors(runtime()) as error:
            raise refused(error) from None

    def close(self) -> None:
        del self.session
        if self._folder is not None:
            self._folder.cleanup()


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    values: Sequence[str] = (),
    library: Path | None = None,
    optimize: bool = True,
    prepack: bool = False,
    trace: Path | None = None,
    providers: Sequence[str | tuple[str, Mapping[str, str]]] = (ON_CPU,),
    config: Mapping[str, str] | None = None,
) -> OrtRunner:
    """Opens an ONNX file.

    `values`: inner values to give back beside the outputs; `library`: custom ops; `optimize` False: the graph as it is
    (function bodies would be folded to float32 weights at load); `prepack`: ONNX Runtime's default, which copies float
    weights into its own order and is what a user of plain ONNX Runtime gets; `trace`: prefix of ONNX Runtime's own
    profile, whose path `runner.session.end_profiling()` gives; `providers`: what runs nodes, the first that can, each
    with its options; `config`: further entries of the session's configuration. Raises Failed where ONNX Runtime refuses
    the file.
    """
    module = runtime()
    options = module.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.log_severity_level = 3
    # Idle sessions would spin on the cores of whoever works next: three sessions at once took twice as long.
    entries = {"session.force_spinning_stop": "1", **(config or {})}
    if not prepack:
        # Weights stay where they are mapped instead of being copied at load.
        entries["session.disable_prepacking"] = "1"
        # The plan for all activations would be a second block beside what the first call took: 55 MiB of DiT-XL/2, for
        # no time that could be measured.
        options.enable_mem_pattern = False
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    if not optimize:
        options.graph_optimization_level = module.GraphOptimizationLevel.ORT_DISABLE_ALL
    if trace is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(trace)
    source: str | bytes = str(path)
    folder = None
    if values:
        source, folder = _with_outputs(path, values, options, version(module))
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        # It would answer an error of one provider by a session without that.
        session = module.InferenceSession(source, options, providers=list(providers), enable_fallback=0)
    except errors(module) as error:
        if folder is not None:
            folder.cleanup()
        raise Failed(f"{path}: ONNX Runtime cannot load it: {_message(error)}", "Build the bundle anew.") from None
    session.disable_fallback()
    give_back()
    return OrtRunner(session, folder)


def _with_outputs(path: Path, values: Sequence[str], options: Any, version_: tuple[int, ...]):
    """The model with further outputs, as bytes, or, for old runtimes, as a file beside a link to its data."""
    import onnx_ir as ir

    from dit2deploy.targets.graph import add_outputs

    model = ir.load(path)
    add_outputs(model, values)
    content = ir.to_proto(model).SerializeToString()
    if version_ >= _FOLDER_OPTION:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
        )
        return content, None
    folder = tempfile.TemporaryDirectory(prefix="dit2deploy-")
    for data in path.parent.resolve().glob("*.data"):
        (Path(folder.name) / data.name).symlink_to(data)
    changed = Path(folder.name) / path.name
    changed.write_bytes(content)
    return str(changed), folder


def refused(error: Exception) -> Misuse:
    """What is told of an error that ONNX Runtime raises when a session runs."""
    return Misuse(f"the engine refused the inputs: {_message(error)}", "Compare them with the manifest.")


def _message(error: Exception) -> str:
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).strip()
