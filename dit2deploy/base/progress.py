"""Progress of long work, told to whoever listens: the command line draws it, the library stays silent."""

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

# Called with (what, done, total or None); total None: unknown. done == total ends the item.
Listener = Callable[[str, int, int | None], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> Callable[[], None]:
    """Adds a listener; the function that comes back removes it."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def report(what: str, done: int, total: int | None = None) -> None:
    for listener in _listeners:
        listener(what, done, total)


def note(text: str) -> None:
    """A line of news (a fallback, a skipped part), shown once."""
    report(text, 0, 0)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Passes the items on and reports after each one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    report(what, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        report(what, done, total)
