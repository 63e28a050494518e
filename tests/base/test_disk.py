"""A full disk is told before a byte is written; what killed runs left goes, what others write stays."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from dit2deploy.base import disk, progress
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import whole_file, whole_folder, write_bytes, write_tensors

Usage = namedtuple("Usage", "total used free")


def dead_process() -> int:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def always(folder: Path) -> bool:
    return True


def test_what_does_not_fit_is_refused_with_both_numbers_and_touches_nothing(tmp_path, monkeypatch):
    write_bytes(tmp_path / "a", b"old")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1500, 1500))
    with pytest.raises(
        Misuse, match=r"a: cannot be written: No space left on device: 1\.50 kB were free, 4\.\d+ kB are"
    ):
        write_tensors(tmp_path / "a", {"x": np.zeros(1000, np.float32)})
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_file_of_a_temporary_folder_is_told_by_its_final_name(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    with pytest.raises(Misuse) as raised, whole_folder(tmp_path / "my.set") as folder:
        write_bytes(folder / "inner" / "x", b"1")
    assert raised.value.cause.startswith(str(tmp_path / "my.set" / "inner" / "x") + ":")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [28, 122, None])
def test_an_error_in_the_middle_is_told_with_what_was_free(tmp_path, number):
    with pytest.raises(Misuse, match="GB were free, 7 bytes are needed"), disk.writing(tmp_path / "x", 7):
        raise OSError(number, "full") if number else OSError("20 requested and 10 written")
    with pytest.raises(Misuse, match=r"cannot be written: Is a directory\.\n"), disk.writing(tmp_path / "x", 7):
        raise IsADirectoryError(21, "Is a directory")


def test_an_error_of_a_file_that_is_read_meanwhile_is_its_own(tmp_path):
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "out"):
        (tmp_path / "other" / "shard").read_bytes()
    with pytest.raises(Misuse, match="out.inner.x.y: cannot be written"), whole_folder(tmp_path / "out") as folder:
        write_bytes(folder / "inner" / "x", b"1")
        write_bytes(folder / "inner" / "x" / "y", b"1")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_ended_processes_go_and_those_of_others_stay(tmp_path):
    host, ended = disk.temporary_name(Path("x")).name.split(".")[2].rpartition("-")[0], dead_process()
    gone = [f".out.{host}-{ended}.part", f".out.{host}-{ended}.old"]
    stay = [
        f".out.{host}-{os.getppid()}.part",
        f".out.elsewhere{host}-{ended}.part",
        f".output.{host}-{ended}.part",
        f".out.more.{host}-{ended}.part",
        ".out.part",
    ]
    for name in (*gone, *stay):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside").write_bytes(b"")
    notes = []
    forget = progress.listen(lambda what, done, total: notes.append(what))
    with whole_folder(tmp_path / "out"):
        pass
    forget()
    assert {path.name for path in tmp_path.iterdir()} == {"out", *stay}
    assert len(notes) == 1 and stay[1] in notes[0] and stay[0] not in notes[0]


def test_what_a_killed_run_was_about_to_replace_gets_its_name_back(tmp_path):
    write_bytes(tmp_path / "out" / "x", b"whole")
    old = disk.temporary_name(tmp_path / "out", "old")
    os.replace(tmp_path / "out", old.with_name(old.name.replace(str(os.getpid()), str(dead_process()))))
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out", replaces=always):
        raise RuntimeError
    assert (tmp_path / "out" / "x").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    write_bytes(tmp_path / "out" / "x", b"old")
    put = os.replace

    def failing(source, target):
        if str(source).endswith(".part") and Path(target).name == "out":
            raise OSError(5, "Input/output error")
        put(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(Misuse, match="Input/output error"), whole_folder(tmp_path / "out", replaces=always) as folder:
        (folder / "x").write_bytes(b"new")
    assert (tmp_path / "out" / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_scratch_folder_goes_and_takes_those_of_killed_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with disk.scratch_folder() as mine, disk.scratch_folder() as other:
        left = tmp_path / f"{mine.name.rpartition('-')[0].rpartition('-')[0]}-{dead_process()}-abc_1"
        left.mkdir()
        assert mine != other
        with disk.scratch_folder():
            assert mine.is_dir() and other.is_dir() and not left.exists()
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_told_in_decimal_units():
    assert [disk.amount(size) for size in (7, 1500, 2_000_000, 25_300_000_000)] == [
        "7 bytes",
        "1.50 kB",
        "2.00 MB",
        "25.30 GB",
    ]


def test_a_known_size_that_fits_is_written(tmp_path):
    with whole_file(tmp_path / "x", size=3) as temporary:
        temporary.write_bytes(b"abc")
    assert (tmp_path / "x").read_bytes() == b"abc"
