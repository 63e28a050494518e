"""Folders of another model's files that take no room: hard links, symbolic links, and where neither goes, copies."""

import os
import shutil
from pathlib import Path


def link_folder(source: Path, out: Path) -> None:
    """Makes the folder `out` with the files of `source` and of the folders in it, under the same names.

    Links lead to the files themselves, also where `source` holds links, as the cache of the hub does.
    """
    for folder, _, names in os.walk(source, followlinks=True):
        place = out / Path(folder).relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            _link((Path(folder) / name).resolve(), place / name)


def _link(file: Path, place: Path) -> None:
    for make in (os.link, os.symlink, shutil.copyfile):
        try:
            make(file, place)
            return
        except (OSError, NotImplementedError):
            if make is shutil.copyfile:
                raise
