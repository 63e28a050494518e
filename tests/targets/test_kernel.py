"""The C entry through ctypes: relayout, errors, and where the library is looked for."""

import numpy as np
import pytest

from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.formats import FORMATS, Format, pack, unpack
from dit2deploy.targets import kernel


def test_a_library_that_is_not_there_is_named_with_its_cure(monkeypatch, tmp_path):
    monkeypatch.setenv(kernel.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(Misuse, match=r"none.so: the kernel library is not there") as caught:
        kernel.library_path()
    assert kernel.LIBRARY_VARIABLE in caught.value.cure


def test_a_file_that_is_no_library_is_refused(tmp_path):
    path = tmp_path / "broken.so"
    path.write_bytes(b"no elf")
    with pytest.raises(Misuse, match="cannot be loaded"):
        kernel.describe(library=path)


def test_the_isa_in_use_is_one_that_runs_here():
    assert kernel.isas()[0] == "portable"
    assert kernel.isa_in_use() in kernel.isas()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(("n", "k"), ((1, 1), (3, 77), (32, 192), (130, 1152)))
def test_relayout_keeps_the_product(fmt: Format, n: int, k: int):
    """Layout 1 is the library's own affair; what it must keep is the product with every unit vector."""
    rng = np.random.default_rng(n)
    codes = rng.integers(-fmt.offset, fmt.levels - 1 - fmt.offset, (n, k), endpoint=True)
    words = kernel.relayout(fmt.name, pack(codes, fmt), k)
    assert words.dtype == np.int32 and words.shape == kernel.relayout_shape(fmt.name, n, k)
    q = np.eye(k, dtype=np.int8)
    inputs = [q, np.ones((k, 1), np.float32), words, np.ones((n, 1), np.float32), np.zeros(n, np.float32)]
    (y,) = kernel.run(f"{fmt.title}Gemm", inputs, {"bits": 8, "layout": 1}, [(k, n)])
    np.testing.assert_array_equal(y.T, unpack(pack(codes, fmt), fmt, k))


def _gemm(**changes):
    inputs = {
        "q": np.ones((2, 40), np.int8),
        "s": np.ones((2, 1), np.float32),
        "w": np.zeros((3, 2), np.int32),
        "ws": np.ones((3, 1), np.float32),
        "bias": np.zeros(3, np.float32),
    }
    return list({**inputs, **changes}.values())


@pytest.mark.parametrize(
    ("inputs", "attributes", "isa"),
    (
        (_gemm(w=np.zeros((3, 5), np.int32)), {}, None),
        (_gemm(s=np.ones((3, 1), np.float32)), {}, None),
        (_gemm(ws=np.ones((3, 3), np.float32)), {}, None),
        (_gemm(bias=np.zeros(4, np.float32)), {}, None),
        (_gemm(q=np.ones((2, 40), np.float32)), {}, None),
        (_gemm()[:4], {}, None),
        (_gemm(), {"layout": 9}, None),
        (_gemm(), {"bits": 99}, None),
        (_gemm(), {"colour": 1}, None),
        (_gemm(), {}, "quantum"),
    ),
    ids=("words", "steps", "groups", "bias", "dtype", "missing", "layout", "bits", "attribute", "isa"),
)
def test_what_does_not_fit_is_refused_with_a_message(inputs, attributes, isa):
    with pytest.raises(Failed) as caught:
        kernel.run("TernaryGemm", inputs, attributes, [(2, 3)], isa=isa)
    assert len(caught.value.cause) > len("TernaryGemm: .")


def test_the_good_case_of_those_is_computed():
    (y,) = kernel.run("TernaryGemm", _gemm(), {}, [(2, 3)])
    np.testing.assert_array_equal(y, np.full((2, 3), -40.0))


def test_a_wrong_output_shape_is_refused():
    with pytest.raises(Failed):
        kernel.run("TernaryGemm", _gemm(), {}, [(2, 4)])


def test_an_unknown_op_names_the_known():
    with pytest.raises(Misuse, match=r"no op Softmax .*TernaryGemm"):
        kernel.run("Softmax", [], {}, [])


def test_an_unknown_format_is_refused():
    with pytest.raises(Failed, match="int5"):
        kernel.relayout("int5", np.zeros((1, 1), np.int32), 4)
