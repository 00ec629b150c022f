"""The whole shards of a fold that was killed, by which the next run goes on where that one stopped.

A fold notes each shard that it has written, with its SHA-256, in a folder of its temporary directory. A run that may
continue it takes the directory over, and keeps a shard only if the note says that it was made from the same base model,
adapter and options, and if its checksum is the one in the note.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.replacements import Replacements
from pcb_peft.errors import OptionError, OutputError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.files.schema import checked
from pcb_peft.runtime.hashing import sha256_of_file
from pcb_peft.runtime.processes import union
from pcb_peft.version import __version__
from pcb_peft.writing.manifest import fingerprint
from pcb_peft.writing.targets import writing

NOTES = ".pcb_peft.shards"
"""Folder of the notes, in the temporary directory of a fold."""


class _Note(msgspec.Struct):
    """The note on a shard: see `Resumable.note`."""

    fold: str
    file: Annotated[str, msgspec.Meta(min_length=1)]
    sha256: str
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Resumable:
    """A fold that the next run can continue.

    Attributes:
        key: Hash of everything that decides the bytes of its shards.
        wanted: Continue what a killed run left, and leave whole shards for the next run if this one ends early.
    """

    key: str
    wanted: bool

    def note(
        self,
        directory: Path,
        file: str,
        sha256: str,
        facts: Mapping[str, Any],
        known: Collection[str],
    ) -> None:
        """Note that a shard is whole.

        Args:
            directory: The temporary directory.
            file: The shard.
            sha256: Its checksum.
            facts: Plain data by module that a run which does not read the deltas could not know.
            known: Modules whose facts were noted before.

        Raises:
            OutputError: The disk is full, or broken.
        """
        path = _note_of(directory, file)
        new = {name: fact for name, fact in facts.items() if name not in known}
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            path.write_text(
                json.dumps({"fold": self.key, "file": file, "sha256": sha256, "facts": new})
            )

    def continues(self, directory: Path) -> bool:
        """Return whether a directory holds a shard of this fold that was noted as whole."""
        return bool(self._noted(directory))

    def whole_shards(self, directory: Path, files: Iterable[str]) -> set[str]:
        """Return those of the files that are noted, and whose checksums are the noted ones."""
        noted = self._noted(directory)
        return {
            file
            for file in files
            if file in noted
            and (directory / file).is_file()
            and sha256_of_file(directory / file) == noted[file].sha256
        }

    def facts_of(self, directory: Path, files: Iterable[str]) -> dict[str, Any]:
        """Return the facts that were noted with some shards."""
        noted = self._noted(directory)
        return union(noted[file].facts for file in files)

    def tidy(self, directory: Path) -> None:
        """Remove what a killed run left beside the shards that it noted.

        Raises:
            OutputError: It cannot be removed.
        """
        noted = {NOTES, *(Path(file).parts[0] for file in self._noted(directory))}
        with writing(directory):
            for path in list(directory.iterdir()):
                if path.name not in noted:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _noted(self, directory: Path) -> dict[str, _Note]:
        """Return the notes on shards of this fold, by shard; those that cannot be read are passed over."""
        found: dict[str, _Note] = {}
        for path in directory.glob(f"{NOTES}/*.json"):
            try:
                content = read_json_file(path, OutputError, "")
                note = checked(content, _Note, str(path), OutputError, "")
            except OutputError:  # written while the power failed
                continue
            if note.fold == self.key:
                found[note.file] = note
        return found


def check_resumable(name: str, identity: str | None, compare_base: object, *, resume: bool) -> None:
    """Raise OptionError where a fold is to be continued that cannot be.

    Args:
        name: Name of the adapter.
        identity: Text by which its deltas are known in another run.
        compare_base: The base model to compare with, if there is one.
        resume: True if it is to be continued.
    """
    if not resume:
        return
    if identity is None:
        raise OptionError(
            f"resume: {name} is in memory, or made from what is, and no other run knows it again: save it and fold "
            "what is saved, or leave out resume (--resume)"
        )
    if compare_base is not None:
        raise OptionError(
            "resume and compare_base: the shards of the earlier run would not be compared; leave out one of the two "
            "(--resume, --compare-base)"
        )


def forget_shards(directory: Path) -> None:
    """Remove all notes: the output is complete."""
    if (directory / NOTES).is_dir():
        shutil.rmtree(directory / NOTES)


def key_of(
    identity: str, base: BaseModel, replaced: Replacements, tied: str, headers: Iterable[bytes]
) -> str:
    """Return a hash of everything that decides the bytes of a fold's shards.

    Args:
        identity: Text by which the deltas are known, such as the SHA-256 of an adapter's file.
        base: The base model; its files are known by their sizes, times, first and last bytes.
        replaced: Parameters and rows that take the place of the base model's.
        tied: Policy for tied weights.
        headers: First bytes of the shards, up to their values.
    """
    files = [(base.directory / file) for file in base.files]
    stated = [(path.name, path.stat().st_mtime_ns, fingerprint(path)) for path in files]
    versions = [__version__, str(torch.__version__)]
    digest = hashlib.sha256(json.dumps([versions, identity, tied, stated]).encode())
    for header in headers:
        digest.update(header)
    for name, new in sorted({**replaced.parameters, **replaced.rows}.items()):
        digest.update(f"{name} {getattr(new, 'indices', '')}".encode())
        digest.update(new.load().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _note_of(directory: Path, file: str) -> Path:
    return directory / NOTES / f"{hashlib.sha256(file.encode()).hexdigest()[:32]}.json"
