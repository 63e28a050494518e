"""Every op, stage, model and format has its one home: what C++ and Python say is compared, and files are listed."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import dit2deploy
import dit2deploy.models
import dit2deploy.ops
import dit2deploy.stages
import dit2deploy.targets
from dit2deploy.formats import FORMATS
from dit2deploy.models.family import Family
from dit2deploy.ops import OPS, VERSION
from dit2deploy.ops.op import Op, OutputRule
from dit2deploy.stages.profile.roofline import is_ours
from dit2deploy.targets import TARGETS, Target, kernel
from dit2deploy.targets.trt_engine import PLUGIN_NAME

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "plugins"
NATIVE = [op for op in OPS if op.native]


@pytest.fixture(scope="module")
def described() -> dict[str, dict]:
    return {entry["name"]: entry for entry in kernel.describe()}


def test_the_library_has_the_native_ops_and_no_other(described):
    assert list(described) == [op.name for op in NATIVE]


@pytest.mark.parametrize("op", NATIVE, ids=str)
def test_op_is_the_same_in_cpp_and_in_python(op: Op, described):
    found = described[op.name]
    assert found["version"] == VERSION
    assert [(port["name"], port["dtype"]) for port in found["inputs"]] == [
        (port.name, port.dtype) for port in op.inputs
    ]
    assert [(port["name"], port["dtype"]) for port in found["outputs"]] == [
        (port.name, port.dtype) for port in op.outputs
    ]
    assert {entry["name"]: entry["default"] for entry in found["attributes"]} == op.attributes
    assert [entry["name"] for entry in found["attributes"]] == list(op.attributes)
    assert [OutputRule(**rule) for rule in found["shapes"]] == list(op.shapes)


@pytest.mark.parametrize("op", NATIVE, ids=str)
def test_op_is_found_in_profiles_and_engines(op: Op):
    name = op.name.encode()
    assert is_ours(op.name)
    assert [match[2] for match in PLUGIN_NAME.finditer(bytes([len(name)]) + bytes(7) + name + bytes(1))] == [name]


def test_every_native_op_has_its_folder_and_no_folder_lacks_an_op():
    folders = {path.name for path in (PLUGINS / "ops").iterdir() if path.is_dir()}
    homes = {module.__name__.rpartition(".")[2] for module in map(_home, NATIVE)}
    assert folders == homes


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_the_library_knows_every_format(fmt):
    rows, columns = kernel.relayout_shape(fmt.name, 3, 100)
    assert 32 * rows * columns >= 300 * fmt.bits


def _home(op: Op):
    """The module of dit2deploy.ops whose `cases` the op uses: its one Python file."""
    function = getattr(op.cases, "func", op.cases)
    return importlib.import_module(function.__module__)


def _modules(package) -> list:
    return [
        importlib.import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]


def _values(package, kind: type) -> list:
    """All values of a kind that lie in the modules of a package, inside of dictionaries too."""
    found = []
    for module in _modules(package):
        for value in vars(module).values():
            for item in value.values() if isinstance(value, dict) else [value]:
                if isinstance(item, kind) and item not in found:
                    found.append(item)
    return found


def test_every_op_is_on_the_list():
    assert {op.name for op in _values(dit2deploy.ops, Op)} == {op.name for op in OPS}
    assert len({op.name for op in OPS}) == len(OPS)


def test_every_family_is_on_the_list():
    families = {family.name for family in _values(dit2deploy.models, Family)}
    assert families == {family.name for family in dit2deploy.models.FAMILIES}


def test_every_target_is_on_the_list():
    assert {target.name for target in _values(dit2deploy.targets, Target)} == {target.name for target in TARGETS}
    assert [dit2deploy.targets.by_name(target.name) for target in TARGETS] == list(TARGETS)


@pytest.mark.parametrize("stage", [found.name for found in pkgutil.iter_modules(dit2deploy.stages.__path__)])
def test_every_stage_offers_the_verb_of_its_name(stage: str):
    verb = getattr(importlib.import_module(f"dit2deploy.stages.{stage}"), stage)
    assert callable(verb) and verb.__doc__


@pytest.mark.parametrize("stage", [found.name for found in pkgutil.iter_modules(dit2deploy.stages.__path__)])
def test_every_stage_has_tests(stage: str):
    tests = ROOT / "tests" / "stages"
    assert (tests / f"test_{stage}.py").is_file() or list((tests / stage).glob("test_*.py"))
