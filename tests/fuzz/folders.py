"""Directories with files, some of which may be no files at all."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from random import Random

from fuzz.values import Steps

Files = dict[str, bytes]
"""Path in a directory to content."""

ODD_FILES = (
    *(
        "missing",
        "empty",
        "directory",
        "link to itself",
        "/dev/zero",
        "pipe",
        "/dev/null",
        "sparse",
    ),
    "link to a directory",
)


def scratch() -> Path:
    """A new directory, in memory where the system has one for that."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))


def files_in(directory: Path) -> Files:
    """The files below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write(directory: Path, files: Mapping[str, bytes]) -> Path:
    """Write files into a directory, in which nothing else is left."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def spoil(directory: Path, rng: Random, steps: Steps) -> None:
    """Make one of the files in a directory something else than a file with content."""
    path = rng.choice([path for path in sorted(directory.rglob("*")) if path.is_file()])
    what = rng.choice(ODD_FILES)
    steps.append(f"{path.name} is {what}")
    path.unlink()
    if what == "empty":
        path.touch()
    elif what == "directory":
        path.mkdir()
    elif what == "link to itself":
        path.symlink_to(path)
    elif what == "link to a directory":
        path.symlink_to(directory)
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 28)
    elif what != "missing":
        path.symlink_to(what)
