"""The disk: an error that says how much was free and how much is needed, and what killed runs left behind."""

import contextlib
import errno
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import note

# A temporary name says whose it is: .NAME.HOST-PROCESS.part, .old for what it is about to replace, and of a scratch
# folder dit2deploy-HOST-PROCESS-RANDOM.
_OWNER = re.compile(r"([A-Za-z0-9]+)-(\d+)(?:\.part|\.old|-\w+)")
_HIDDEN = re.compile(r"\.(.+)\.[A-Za-z0-9]+-\d+\.part")
_SCRATCH = "dit2deploy-"
_CURE = "Free some space or choose another place, then run the same command again: what is finished is kept."
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", platform.node()) or "here"


def temporary_name(path: Path, kind: str = "part") -> Path:
    """The name beside `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.{kind}")


def free_bytes(folder: Path) -> int | None:
    """Of the disk that the folder is on, or will be; None where the system does not tell."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


@contextmanager
def writing(path: Path, size: int | None = None, *, cure: str = _CURE) -> Iterator[None]:
    """Around what writes `path`, a file or folder of `size` bytes (None: not known before).

    Raises Misuse with what was free and what is needed: before a byte is written where they do not fit, and in place of
    the system's error where the disk fills up meanwhile or cannot be written. An error of a file elsewhere, which is
    being read meanwhile, passes.
    """
    free = free_bytes(path.parent)
    if size is not None and free is not None and free < size:
        raise _refusal(path, os.strerror(errno.ENOSPC), free, size, cure)
    try:
        yield
    except OSError as error:
        names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
        if names and not any(_is_of(Path(name), path) for name in names):  # a copy names both its ends
            raise
        # numpy's writers give no number for a full disk.
        told = free if error.errno in (*_FULL, None) else None
        raise _refusal(path, reason(error), told, size, cure) from error


def _is_of(place: Path, path: Path) -> bool:
    """Whether `place` is `path` or one of its temporary names, lies below one of them, or is a folder above."""
    place, path = (Path(os.path.abspath(name)) for name in (place, path))
    if path.is_relative_to(place):
        return True
    if not place.is_relative_to(path.parent):
        return False
    first = place.relative_to(path.parent).parts[0]
    return first == path.name or first.startswith(f".{path.name}.")


def reason(error: OSError) -> str:
    return error.strerror or str(error)


def _refusal(path: Path, why: str, free: int | None, size: int | None, cure: str) -> Misuse:
    numbers = [] if free is None else [f"{amount(free)} were free"]
    numbers += [f"{amount(size)} are needed"] if size is not None and numbers else []
    shown = Path(*(_HIDDEN.sub(r"\1", part) for part in path.parts))
    return Misuse(f"{shown}: cannot be written: {why}{': ' if numbers else ''}{', '.join(numbers)}.", cure)


def amount(size: int) -> str:
    """Bytes as people read them, in decimal units."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


def sweep(path: Path) -> None:
    """Removes what killed runs on this machine left of `path` under temporary names; what one of them was about to
    replace gets its name back. A note names what other machines left, containers of another name among them: whether
    they still write cannot be seen from here."""
    owned = _owned(path.parent, f".{path.name}.")
    others = [entry.name for entry, host, _ in owned if host != _host()]
    if others:
        note(f"{path.parent}: {', '.join(others)} is of another machine; remove it if nothing there writes {path.name}")
    for left in _orphans(owned):
        if left.suffix == ".old" and not path.exists():
            os.replace(left, path)
        else:
            _remove(left)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder where TMPDIR says, gone when the block ends; those of killed runs on this machine go before."""
    place = Path(tempfile.gettempdir())
    for left in _orphans(_owned(place, _SCRATCH)):
        _remove(left)
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{_host()}-{os.getpid()}-") as folder:
        yield Path(folder)


def _orphans(owned: Iterable[tuple[Path, str, int]]) -> list[Path]:
    """Those that belong to a process of this machine that has ended."""
    return [entry for entry, host, process in owned if host == _host() and not _runs(process)]


def _owned(folder: Path, prefix: str) -> list[tuple[Path, str, int]]:
    """Entries of the folder under temporary names that begin so, with the machine and the process of each."""
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        owner = _OWNER.fullmatch(entry.name[len(prefix) :]) if entry.name.startswith(prefix) else None
        if owner:
            found.append((entry, owner[1], int(owner[2])))
    return found


def _runs(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere, asking would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
