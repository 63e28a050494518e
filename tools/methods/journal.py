"""The journal of the methods table: what is done survives a kill."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit2deploy.base.files import sha256_of_json


class Journal:
    """Cells that are done, one JSON object a line; a line that a kill cut short does not count."""

    def __init__(self, path: Path, inputs: Any) -> None:
        self._path, self._inputs, self._cells = path, inputs, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            try:
                cell = json.loads(line)
            except json.JSONDecodeError:
                continue
            self._cells[cell["key"]] = cell["values"]

    def _key(self, row: str, column: str, seed: int) -> str:
        return sha256_of_json([self._inputs, row, column, seed])

    def get(self, row: str, column: str, seed: int) -> dict[str, float] | None:
        return self._cells.get(self._key(row, column, seed))

    def add(self, row: str, column: str, seed: int, values: Mapping[str, float]) -> None:
        key = self._key(row, column, seed)
        self._cells[key] = dict(values)
        told = {"key": key, "row": row, "column": column, "seed": seed, "values": values}
        with self._path.open("a") as file:
            # A line of its own also where the one before was cut short.
            file.write(("" if self._is_whole() else "\n") + json.dumps(told) + "\n")

    def _is_whole(self) -> bool:
        content = self._path.read_bytes()
        return not content or content.endswith(b"\n")
