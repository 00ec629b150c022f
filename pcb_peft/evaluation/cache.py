"""Outcomes of models on texts, kept by what they were computed from."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pcb_peft.errors import OutputError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.files.schema import Number, checked
from pcb_peft.runtime.hashing import sha256_of_file
from pcb_peft.runtime.paths import cache_directory
from pcb_peft.runtime.processes import current
from pcb_peft.writing.atomic import write_file_atomically
from pcb_peft.writing.targets import writing

ANEW = "it is computed anew"
HASHED = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}


def default_cache_directory() -> Path:
    """The user's cache directory for outcomes: ``$XDG_CACHE_HOME/pcb_peft/evaluation``."""
    return cache_directory("evaluation")


@dataclasses.dataclass(frozen=True, slots=True)
class OutcomeCache:
    """Outcomes on disk, each in a file that is named by the hash of what it was computed from.

    Attributes:
        directory: Where the files are; None keeps nothing.
    """

    directory: Path | None

    def get(self, key: Mapping[str, Any], compute: Callable[[], list[float]]) -> list[float]:
        """The outcomes for a key, computed and kept if they are not there. All processes must call it together.

        Args:
            key: Everything that the outcomes depend on, as plain data.
            compute: Called in all processes, or in none.
        """
        path = self._path(key)
        outcomes: list[float] | None = current().reduce(path, lambda paths: _read(paths[0], _Kept))
        if outcomes is not None:
            return outcomes
        outcomes = compute()
        if path is not None and current().is_main:
            write_json(path, {"key": dict(key), "outcomes": outcomes})
        return outcomes

    def file_digest(self, path: Path) -> str:
        """SHA-256 of a file; kept by its path, size and time of change, so that large files are read once."""
        status = path.stat()
        facts = {
            "file": str(path.resolve()),
            "size": status.st_size,
            "changed": status.st_mtime_ns,
        }
        memo = self._path(facts)
        known: str | None = _read(memo, _Digest)
        if known is not None:
            return known
        digest = sha256_of_file(path)
        if memo is not None:
            write_json(memo, {"key": facts, "outcomes": digest})
        return digest

    def directory_digest(self, directory: Path) -> str:
        """SHA-256 of the weights, configuration and tokenizer in a directory."""
        files = sorted(
            path for path in directory.iterdir() if path.is_file() and path.suffix in HASHED
        )
        return digest_of({path.name: self.file_digest(path) for path in files})

    def _path(self, key: Mapping[str, Any]) -> Path | None:
        digest = digest_of(key)
        return None if self.directory is None else self.directory / digest[:2] / f"{digest}.json"


def digest_of(value: Any) -> str:
    """SHA-256 of plain data."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file into the cache, whole or not at all; a warning says if that cannot be done."""
    text, folder = json.dumps(content), path.parent
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_file_atomically(path, lambda file: file.write_text(text, "utf-8"), overwrite="all")
    except OutputError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        warnings.warn(  # the same words for each of many files: they are said once
            f"nothing is kept for the next evaluation: {folder.parent} cannot be written: {reason}",
            stacklevel=2,
        )


class _Kept(msgspec.Struct):
    """A file with the outcomes of a model on texts."""

    outcomes: list[Number]


class _Digest(msgspec.Struct):
    """A file with the hash of another file."""

    outcomes: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


def _read(path: Path | None, schema: type[_Kept] | type[_Digest]) -> Any:
    """Return what a file keeps; None if there is no file, or a damaged one, which is then written anew."""
    if path is None or not path.is_file():
        return None
    try:
        content = read_json_file(path, OutputError, ANEW)
        return checked(content, schema, str(path), OutputError, ANEW).outcomes
    except OutputError:
        return None
