"""Models by the name that they have on the Hugging Face Hub: fetched once, at a revision that is then written down."""

import re
from pathlib import Path

from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import read_json
from dit2deploy.base.progress import note

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")
_INDEX = "model_index.json"
_SMALL = ("*.json", "*.txt", "*.model")  # configs, vocabularies


def local(model: str | Path) -> Path:
    """The folder of a model: `model` itself, or where it is no path here and reads OWNER/NAME or OWNER/NAME@REVISION,
    the hub's. Of a pipeline the folders of its components are fetched, safetensors only; what is in the hub's cache is
    not fetched again, and without a network the cache is what there is.

    Raises Misuse where the hub does not have it or cannot be asked and it is not in the cache.
    """
    path, asked = Path(model), _ID.fullmatch(str(model))
    if path.exists() or asked is None:
        return path
    folder = _fetched(asked, _SMALL)
    index = folder / _INDEX
    parts = [name for name, kind in read_json(index).items() if isinstance(kind, list)] if index.is_file() else [""]
    folder = _fetched(asked, tuple(f"{part}/*.safetensors".lstrip("/") for part in parts))
    note(f"{asked['repo']} at revision {folder.name}")
    return folder


def pinned(folder: Path) -> str:
    """OWNER/NAME@COMMIT of a folder in the hub's cache, or of one in it; "" for any other."""
    found = _SNAPSHOT.search(folder.absolute().as_posix())
    return f"{found['owner']}/{found['name']}@{found['commit']}" if found else ""


def _fetched(asked: re.Match[str], patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(asked["repo"], revision=asked["revision"], allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Misuse(
            f"{asked[0]}: is no folder here, and the hub does not give it: {reason}",
            "Check the path or the name (OWNER/NAME or OWNER/NAME@REVISION), the network, and `hf auth login`.",
        ) from error
