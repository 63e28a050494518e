"""What all artefacts share: pydantic records that refuse unknown fields, and errors that name the first fault."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import read_json, write_json


class Record(BaseModel):
    """A frozen record of a JSON file; unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


R = TypeVar("R", bound=Record)


def first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"


def parse(kind: type[R], value: Any, where: Path, *, cure: str) -> R:
    """The record; Misuse where the value is of a newer schema or does not fit."""
    newest = kind.model_fields["schema_version"].default
    version = value.get("schema_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > newest:
        raise Misuse(
            f"{where}: has schema version {version}; this dit2deploy reads up to {newest}.",
            "Install a newer dit2deploy.",
        )
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise Misuse(f"{where}: {first_fault(error)}.", cure) from None


def load(kind: type[R], path: Path, *, cure: str) -> R:
    return parse(kind, read_json(path, cure=cure), path, cure=cure)


def save(record: Record, path: Path) -> None:
    write_json(path, record.model_dump(mode="json"))


def holds(kind: type[Record], name: str) -> Callable[[Path], bool]:
    """Whether a folder's file `name` is a record of this kind, of whatever version."""
    fields = kind.model_fields
    expected = fields["kind"].default if "kind" in fields else None

    def check(folder: Path) -> bool:
        try:
            value = read_json(folder / name)
        except Misuse:
            return False
        return isinstance(value, dict) and value.get("kind") == expected

    return check
