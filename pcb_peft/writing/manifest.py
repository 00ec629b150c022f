"""The list of files that this package wrote into a directory, by which it knows them again.

``--overwrite`` replaces a directory only if everything in it is on the list, as it was written. What a user put there,
or changed, is not deleted by accident.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pcb_peft.errors import OutputError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.files.schema import checked

MANIFEST = ".pcb_peft.json"
_NEXT = ".pcb_peft.next.json"
_SAMPLED = 1 << 16  # bytes at each end of a file


class _Manifest(msgspec.Struct):
    """The list of files: name to fingerprint."""

    files: dict[str, str]


def write_manifest(directory: Path) -> None:
    """Write the list of all files in a directory into it."""
    files = {name: fingerprint(directory / name) for name in sorted(_files(directory))}
    text = json.dumps({"written_by": "pcb_peft", "files": files}, indent=1) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def update_manifest(directory: Path, names: tuple[str, ...]) -> None:
    """Take files that were written later into the list, if the directory has one."""
    listed = _listed(directory)
    if not listed:
        return
    listed |= {name: fingerprint(directory / name) for name in names}
    text = json.dumps({"written_by": "pcb_peft", "files": dict(sorted(listed.items()))}, indent=1)
    (directory / _NEXT).write_text(text + "\n", encoding="utf-8")
    (directory / _NEXT).replace(directory / MANIFEST)  # a killed run leaves the list that was there


def foreign_file(directory: Path) -> str | None:
    """Return a file in a directory that this package did not write, or that has changed since; None if there is none.

    A directory that is not on the way to a listed file counts, too.
    """
    listed = _listed(directory)
    folders = {folder.as_posix() for name in listed for folder in Path(name).parents}
    for folder, subfolders, files in walk(directory):
        place = Path(folder).relative_to(directory)
        for name in sorted(subfolders):
            path = (place / name).as_posix()
            if path not in folders or (directory / path).is_symlink():
                return path
        for name in sorted(files):
            path = (place / name).as_posix()
            known = path in (MANIFEST, _NEXT) or listed.get(path) == fingerprint(directory / path)
            if not (listed and known):
                return path
    return None


def walk(directory: Path, *, topdown: bool = True) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the folders in a directory, each with its folders and files, as `os.walk` does.

    Raises:
        OSError: One of them cannot be read; `os.walk` passes over it in silence.
    """

    def refuse(error: OSError) -> None:
        raise error

    return os.walk(directory, topdown=topdown, onerror=refuse)


def _files(directory: Path) -> Iterator[str]:
    for folder, _, files in walk(directory):
        for name in files:
            path = Path(folder, name).relative_to(directory).as_posix()
            if path not in (MANIFEST, _NEXT):
                yield path


def _listed(directory: Path) -> dict[str, str]:
    """Return the fingerprints of the listed files; empty where there is no list that can be read."""
    try:
        content = read_json_file(directory / MANIFEST, OutputError, "")
        return checked(content, _Manifest, MANIFEST, OutputError, "").files
    except OutputError:
        return {}


def fingerprint(path: Path) -> str:
    """Return a file's size, and the SHA-256 of its first and its last 64 KiB, which is quick for any size.

    A link is told by what it says, not by what it leads to.
    """
    if path.is_symlink() or not path.is_file():
        return "no file"
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.sha256(file.read(_SAMPLED))
        file.seek(max(_SAMPLED, size - _SAMPLED))
        digest.update(file.read(_SAMPLED))
    return f"{size}:{digest.hexdigest()}"
