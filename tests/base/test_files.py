"""Files are whole or absent; a safetensors file that lies is refused; nothing leads out of a folder."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import (
    TensorFile,
    inside,
    sha256_of_folder,
    whole_folder,
    write_bytes,
    write_distinct_tensors,
    write_tensors,
)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "folder") as temporary:
        (temporary / "half").write_bytes(b"half")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_bytes(path, None)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "folder"
    for name in ("one", "two"):
        with whole_folder(folder, replaces=lambda _: True) as temporary:
            (temporary / name).write_bytes(b"")
    assert [file.name for file in folder.iterdir()] == ["two"]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_holds_something_else_is_kept(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_bytes(b"years")
    monkeypatch.chdir(tmp_path / "mine")
    for place in (tmp_path / "mine", Path("."), Path("thesis.txt")):
        with pytest.raises(Misuse, match="holds something else"), whole_folder(place):
            pass
    assert (tmp_path / "mine" / "thesis.txt").read_bytes() == b"years" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as folder:
        (folder / "a").write_bytes(b"1")
    assert (tmp_path / "empty" / "a").exists()


def test_one_entry_of_a_tensor_is_read_alone(tmp_path):
    values = {"a": np.arange(3, dtype=np.int8), "x": np.random.default_rng(0).standard_normal((4, 2, 3), np.float32)}
    write_tensors(tmp_path / "x", values)
    file = TensorFile(tmp_path / "x")
    for index in range(4):
        entry = file.read_entry("x", index)
        np.testing.assert_array_equal(entry, values["x"][index])
        assert entry.base is None or entry.base.nbytes == entry.nbytes
    for index in (-1, 4):
        with pytest.raises(IndexError):
            file.read_entry("x", index)
    with pytest.raises(Misuse, match="no tensor"):
        file.read_entry("y", 0)


def test_tensors_go_to_and_from_the_safetensors_library(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.zeros((0, 4), np.int32),
        "c": np.array(7, np.int64),
        "d": np.arange(3, dtype=np.float16),
    }
    write_tensors(tmp_path / "ours", tensors, {"made": "here"})
    for name, value in load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(value, tensors[name])
    save_file(tensors, tmp_path / "theirs")
    file = TensorFile(tmp_path / "theirs")
    assert sorted(file) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(file.read(name), value)
        assert file.read(name).dtype == value.dtype
    assert TensorFile(tmp_path / "ours").metadata == {"made": "here"}


def test_equal_tensors_are_stored_once_and_read_by_every_name(tmp_path):
    large = np.random.default_rng(0).standard_normal((20, 30), np.float32)
    tensors = {
        "a": large,
        "other bits": large.view(np.int32),
        "b": large.copy(),
        "other shape": large.reshape(30, 20),
        "small": np.ones(3),
        "as small": np.ones(3),
        "minus": np.zeros((20, 30), np.float32) * -1,
        "zero": np.zeros((20, 30), np.float32),
        "c": large,
    }
    write_distinct_tensors(tmp_path / "x", tensors)
    file = TensorFile(tmp_path / "x")
    assert file.stored_as == {"b": "a", "c": "a"}
    stored = load_file(tmp_path / "x")
    assert set(stored) == set(tensors) - {"b", "c"}
    assert set(file) == set(tensors) and len(file) == len(tensors)
    for name, value in tensors.items():
        assert name in file and file.shape(name) == value.shape and file.nbytes(name) == value.nbytes
        np.testing.assert_array_equal(file.read(name), value)
        assert file.read(name).tobytes() == value.tobytes()
    np.testing.assert_array_equal(file.read_entry("c", 7), large[7])
    write_tensors(tmp_path / "all", tensors)
    saved = (tmp_path / "all").stat().st_size - (tmp_path / "x").stat().st_size
    assert abs(saved - 2 * large.nbytes) < 200  # header


@pytest.mark.parametrize(
    "table, fault",
    [
        ('{"b": "nowhere"}', "'b' is said to be stored as 'nowhere', which is not there"),
        ('{"b": "c", "c": "b"}', "'b' is said to be stored as 'c', which is not there"),
        ('{"b": "x", "c": "b"}', "'c' is said to be stored as 'b', which is not there"),
        ('{"x": "x"}', "'x' is there, and is said to be stored as 'x'"),
        ('{"b": ["x"]}', "which is not there"),
        ('["x"]', "is no table"),
        ("{", "header is broken"),
    ],
)
def test_a_table_of_equal_tensors_that_lies_is_refused(tmp_path, table, fault):
    (tmp_path / "x").write_bytes(_file({"__metadata__": {"dit2deploy.stored_as": table}, **GOOD}))
    with pytest.raises(Misuse, match="header is broken") as caught:
        TensorFile(tmp_path / "x")
    caught.match(fault)


def test_bfloat16_is_read_as_its_value(tmp_path):
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    words = (np.array([1.5, -3.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + words.tobytes())
    assert TensorFile(tmp_path / "x").read("x").tolist() == [1.5, -3.0]


def _file(header: object, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        _file(GOOD)[:-1],
        _file(GOOD, length=2**62),
        _file(GOOD, length=10**7),
        _file(b"\xff\xfe{"),
        _file(b"[1, 2]"),
        _file({"x": 3}),
        _file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
        _file({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        _file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}),
        _file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}),
        _file({"x": {"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 8]}}),
        _file({"x": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}),
        b"\x80\x04\x95" + b"\0" * 32,
    ],
    ids=[
        "empty",
        "short",
        "truncated",
        "huge-header",
        "header-past-end",
        "no-utf8",
        "list",
        "no-record",
        "wrong-size",
        "negative-dim",
        "past-end",
        "negative-offset",
        "unknown-dtype",
        "text-dim",
        "pickle",
    ],
)
def test_a_file_that_lies_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(Misuse):
        TensorFile(tmp_path / "x")


def test_what_no_float_model_holds_is_known_by_name(tmp_path):
    (tmp_path / "x").write_bytes(_file({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}))
    file = TensorFile(tmp_path / "x")
    assert file.dtype("x") == "F8_E4M3" and file.nbytes("x") == 8
    with pytest.raises(Misuse, match="F8_E4M3, which is not read"):
        file.read("x")


def test_no_name_leads_out_of_a_folder(tmp_path):
    assert inside(tmp_path, "a/b") == tmp_path / "a" / "b"
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(Misuse):
            inside(tmp_path, name)


def test_a_link_as_in_the_hubs_cache_is_inside(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"1")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").symlink_to("../blobs/abc")
    assert inside(tmp_path / "snapshot", "config.json").read_bytes() == b"1"


def test_the_hash_of_a_folder_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    first = sha256_of_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = sha256_of_folder(tmp_path)
    (tmp_path / "b").write_bytes(b"2")
    assert len({first, second, sha256_of_folder(tmp_path)}) == 3
