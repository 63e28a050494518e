"""unfinished.json: how far a stage came that has not ended, beside its finished parts; it goes when the stage ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dit2deploy.artefacts import schema
from dit2deploy.base.command import command

FILE = "unfinished.json"


class Unfinished(schema.Record):
    """`done` of `total` of `what` ("layers"); `missing` names the others, in order, where they have names."""

    schema_version: Literal[1] = 1
    kind: Literal["unfinished"] = "unfinished"
    stage: str
    what: str
    done: int
    total: int
    missing: tuple[str, ...] = ()
    command: str = ""  # that goes on; empty: the same call of the library


def tell(folder: Path, stage: str, what: str, *, done: int, total: int, missing: Sequence[str] = ()) -> None:
    """Writes the record into the folder of the stage's parts."""
    record = Unfinished(stage=stage, what=what, done=done, total=total, missing=tuple(missing), command=command())
    schema.save(record, folder / FILE)


def read(path: Path) -> list[Unfinished]:
    """What is unfinished of the artefact `path`: in it, and in the folders of parts and work beside it and in it."""
    folders = [path, *(path.with_name(path.name + suffix) for suffix in (".parts", ".work"))]
    folders += [inner for folder in folders if folder.is_dir() for inner in sorted(folder.glob("*.parts"))]
    cure = "Run the stage again: it writes it anew."
    return [schema.load(Unfinished, folder / FILE, cure=cure) for folder in folders if (folder / FILE).is_file()]
