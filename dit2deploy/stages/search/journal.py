"""The journal of a search: each measurement is one JSON line, so that a killed search goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit2deploy.base.disk import writing
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_json


class Journal:
    """Lines {"key", "value"} of a file; the key is the sha256 of all that a measurement depends on."""

    def __init__(self, path: Path, *, stamp: Any) -> None:
        """`stamp` is what all measurements of this search share. A last line that was cut short does not count."""
        self.path = path
        self.measured = 0  # in this run, not taken from the file
        self._stamp = sha256_of_json(stamp)
        self._known: dict[str, Any] = {}
        try:
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["value"]
                except (ValueError, TypeError, KeyError):
                    continue
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as error:
            raise Misuse(f"{path}: cannot be read: {error}.", "Remove the file; the search then starts anew.") from None

    def __len__(self) -> int:
        """Measurements that the file holds, of this search or another one."""
        return len(self._known)

    def value(self, what: Any, measure: Callable[[], Any]) -> Any:
        """The value known of `what` (JSON), or the one that `measure` gives (JSON), which is written down at once."""
        key = sha256_of_json([self._stamp, what])
        if key not in self._known:
            self._known[key] = json.loads(json.dumps(measure()))
            self.measured += 1
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # The line break comes first: a line that was cut short spoils no other.
                with open(self.path, "a") as file:
                    file.write("\n" + json.dumps({"key": key, "value": self._known[key]}))
        return self._known[key]
