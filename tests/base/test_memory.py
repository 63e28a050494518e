"""A ceiling is told before it is broken, with what needs how much."""

import platform

import numpy as np
import pytest

from dit2deploy.base import memory
from dit2deploy.base.errors import Misuse
from dit2deploy.base.machine import anonymous_bytes, available_bytes
from dit2deploy.base.memory import SLACK, require, room


def test_memory_that_is_taken_is_counted():
    before = anonymous_bytes()
    held = np.ones(1 << 25)
    grown = anonymous_bytes() - before
    assert 0.9 * held.nbytes < grown < 1.5 * held.nbytes
    assert available_bytes() > 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_what_was_freed_between_what_is_in_use_is_given_back():
    blocks = [b"x" * 65536 for _ in range(1000)]
    held = blocks[::100] + blocks[-1:]
    before = anonymous_bytes()
    del blocks
    memory.give_back()
    assert before - anonymous_bytes() > 900 * 65536
    assert len(held) == 11


def test_room_is_what_is_left_below_the_ceiling(monkeypatch):
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 3 << 30)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10 << 30)
    assert room(5 << 30) == 2 << 30
    assert room(64 << 30) == room(None) == 10 << 30
    assert require("x", 1 << 30, 5 << 30) == (1 << 30) - SLACK


@pytest.mark.parametrize(
    ("ceiling", "told"), [(4 << 30, "a ceiling of 4.29 GB allows"), (None, "this machine has free")]
)
def test_what_does_not_fit_says_what_needs_how_much(monkeypatch, ceiling, told):
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 3 << 30)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 30)
    with pytest.raises(Misuse, match=told) as caught:
        require("layer x", 2 << 30, ceiling)
    assert "layer x takes" in caught.value.cause and "--max-memory" in caught.value.cure
    if ceiling:  # the ceiling that is named would do
        assert float(caught.value.cure.split()[-1].rstrip(".").removesuffix("GB`")) * 1e9 >= (5 << 30) + SLACK


def test_pages_of_files_in_a_control_group_count_as_free(tmp_path):
    for name, told in (("max", "1000"), ("current", "900"), ("stat", "anon 300\nactive_file 200\ninactive_file 350\n")):
        (tmp_path / f"memory.{name}").write_text(told)
    assert available_bytes(tmp_path) == 1000 - 900 + 550
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 1 << 20
