"""The contract that every target keeps, on the machine at hand."""

import numpy as np
import pytest

from dit2deploy.base.errors import Dit2DeployError, Misuse
from dit2deploy.targets import TARGETS, Target, by_name

ON_GPU = ("ort-cuda", "tensorrt-rtx", "tensorrt")
PARAMS = [pytest.param(target, marks=[pytest.mark.gpu] * (target.name in ON_GPU)) for target in TARGETS]


@pytest.fixture(scope="module", params=PARAMS, ids=lambda target: target.name)
def target(request) -> Target:
    return request.param


def test_a_target_that_cannot_do_something_says_why_and_what_cures_it(target: Target):
    able = target.availability()
    if not (able.can_build and able.can_run):
        assert able.reason and able.cure


@pytest.fixture(scope="module")
def bundle(target: Target, sample, tmp_path_factory):
    able = target.availability()
    if not able.can_build:
        pytest.skip(f"{target.name}: {able.reason}")
    return sample.bundle(target, tmp_path_factory.mktemp(target.name) / "bundle")


def test_what_was_built_is_told(target: Target, bundle):
    record = bundle.target(target.name)
    assert record.engines and set(record.engines.values()) <= set(record.files)
    assert all(name.startswith(f"{target.name}/") and bundle.path(name).is_file() for name in record.files)
    assert record.weight_bytes > 0


def test_an_engine_computes_what_pytorch_computes(target: Target, bundle, sample):
    able = target.availability()
    if not able.can_run:
        with pytest.raises(Misuse, match=r"(?s).+\n.+"):
            target.open(bundle)
        pytest.skip(f"{target.name}: {able.reason}")
    runner = target.open(bundle, threads=1)
    got = runner.run(sample.inputs)
    one = runner.run({"x": sample.inputs["x"][:1]})
    runner.close()
    assert list(got) == ["y"] and got["y"].dtype == np.float32
    np.testing.assert_allclose(got["y"], sample.output, rtol=0, atol=2e-5 * abs(sample.output).max())
    np.testing.assert_array_equal(one["y"], got["y"][:1])


def test_inner_values_come_beside_the_outputs(target: Target, bundle, sample):
    if not target.availability().can_run:
        pytest.skip(f"{target.name}: {target.availability().reason}")
    try:
        runner = target.open(bundle, values=("a.y", "y"))
    except Misuse as error:
        pytest.skip(error.cause)
    got = runner.run(sample.inputs)
    assert set(got) == {"y", "a.y"}
    np.testing.assert_allclose(got["a.y"], sample.first, rtol=0, atol=2e-6 * abs(sample.first).max())
    with pytest.raises(Misuse, match="no value 'nothing'"):
        target.open(bundle, values=("nothing",))


@pytest.mark.parametrize(
    "inputs",
    ({}, {"x": np.zeros((1, 5, 47), np.float32)}, {"x": np.zeros((1, 5, 48))}, {"z": np.zeros((1, 5, 48), np.float32)}),
    ids=("nothing", "shape", "dtype", "name"),
)
def test_wrong_inputs_are_refused(target: Target, bundle, inputs):
    if not target.availability().can_run:
        pytest.skip(f"{target.name}: {target.availability().reason}")
    with pytest.raises(Misuse, match="refused the inputs"):
        target.open(bundle).run(inputs)


def test_an_option_that_a_target_does_not_have_is_refused(target: Target, sample, tmp_path):
    if not target.availability().can_build:
        pytest.skip(f"{target.name}: {target.availability().reason}")
    with pytest.raises(Dit2DeployError, match="colour"):
        sample.bundle(target, tmp_path / "bundle", colour="blue")


def test_an_unknown_name_names_the_known():
    with pytest.raises(Misuse, match=r"(?s)unknown target 'npu'.*ort-cpu"):
        by_name("npu")
