"""Directories and files that appear whole or not at all.

An output is written into a temporary directory beside it, synced, and then moved to its place. Where the kernel can
exchange two directories in one step, there is always either the old output or the new one. Elsewhere the old directory
is set aside first, and the next run finishes what a killed one began: see `pcb_peft.writing.leftovers`.
"""

import contextlib
import errno
import os
import stat
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

from pcb_peft.errors import OutputError
from pcb_peft.runtime.processes import Processes
from pcb_peft.writing.leftovers import aside, never, remove, repair, temporary_directory
from pcb_peft.writing.manifest import walk, write_manifest
from pcb_peft.writing.rename import exchange, move_to_free_place
from pcb_peft.writing.resume import Resumable, forget_shards
from pcb_peft.writing.targets import (
    Inputs,
    Overwrite,
    check_file_target,
    check_target,
    resolved,
    writing,
)

_OWNER_ONLY = 0o700
_AT_ONCE = 1 << 24  # bytes


@contextlib.contextmanager
def replace_directory(
    target: Path, *, overwrite: Overwrite, inputs: Inputs = (), resumable: Resumable | None = None
) -> Generator[Path]:
    """Yield a temporary directory that takes the place of `target` once the block ends without an exception.

    It lies beside the target, under a new name each time. At the end every file gets the mode that the umask gives, a
    list of the files is added, all is synced, and the directory is moved to its place. Until then `target` is
    untouched. A directory that is replaced hands on its mode bits and its group.

    Args:
        target: Directory to write. A symbolic link is followed and stays.
        overwrite: Replace `target` even though it holds something: True, if this package wrote all of it; "all",
            whatever it holds. An empty directory is always replaced.
        inputs: What the output is made from, which it must not replace.
        resumable: The fold that is written, if the next run can continue it; what a killed run of it left is yielded
            again, if that is wanted.

    Raises:
        OutputError: `target` cannot be replaced, or must not.
    """
    place = resolved(target)
    continued = resumable.continues if resumable is not None and resumable.wanted else never
    with contextlib.ExitStack() as stack:
        with writing(target):
            repair(place, continued)
            check_target(place, overwrite=overwrite, inputs=inputs)
            directory = temporary_directory(place, continued=continued)
            temporary = stack.enter_context(directory)
            replaced = place.stat() if place.exists() else None
            if replaced is not None:
                _take_owner(temporary, replaced, stat.S_IMODE(replaced.st_mode) | _OWNER_ONLY)
        yield temporary
        with writing(target):
            forget_shards(temporary)
            write_manifest(temporary)
            _chmod_and_sync(temporary)
            if replaced is not None:
                temporary.chmod(stat.S_IMODE(replaced.st_mode))
            check_target(place, overwrite=overwrite, inputs=inputs)
            _swap(temporary, place, overwrite=bool(overwrite))


@contextlib.contextmanager
def shared_directory(
    target: Path,
    processes: Processes,
    *,
    overwrite: Overwrite,
    inputs: Inputs = (),
    resumable: Resumable | None = None,
) -> Generator[Path]:
    """Yield a directory as `replace_directory` does, in which several processes write; the first makes and renames it.

    Raises:
        OutputError: Also where the processes have no file system in common.
    """
    with contextlib.ExitStack() as stack:
        made = None
        if processes.is_main:
            replacement = replace_directory(
                target, overwrite=overwrite, inputs=inputs, resumable=resumable
            )
            made = stack.enter_context(replacement)
        directory = processes.reduce(made, lambda paths: paths[0])
        if directory is None or not directory.is_dir():
            raise OutputError(
                f"{directory} was made by the first process, and this process does not see it: "
                "name a directory on a file system that all machines share"
            )
        yield directory
        processes.barrier()
    processes.barrier()


def write_file_atomically(
    target: Path,
    write: Callable[[Path], object],
    *,
    overwrite: Overwrite,
    is_ours: Callable[[Path], bool] = lambda _: True,
) -> None:
    """Write a file that appears whole or not at all.

    It is written in a temporary directory beside the target, gets the mode that the umask gives, or that of the file
    that it replaces, is synced, and then moved to its place: a run that is killed leaves the old file.

    Args:
        target: The file. A symbolic link is followed and stays.
        write: Writes the content to the path that it is given.
        overwrite: Replace `target` if it exists: True, if this package wrote it; "all", whatever it is.
        is_ours: Tells whether this package wrote a file.

    Raises:
        OutputError: `target` cannot be written, or must not be replaced.
    """
    check_file_target(target, overwrite=overwrite, is_ours=is_ours)
    place = resolved(target)
    with writing(target):
        repair(place)
        with temporary_directory(place, _OWNER_ONLY) as directory:
            mode, temporary = _umask_mode(directory), directory / place.name
            write(temporary)
            temporary.chmod(mode)
            if place.exists():
                _take_owner(temporary, place.stat(), stat.S_IMODE(place.stat().st_mode))
            _sync(temporary)
            check_file_target(target, overwrite=overwrite, is_ours=is_ours)
            (Path.replace if overwrite else move_to_free_place)(temporary, place)
            _sync_directory(place.parent)


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a directory, by their relative paths.

    Raises:
        OutputError: The disk is full, or broken.
    """
    for name, content in files.items():
        path = directory / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file; what has no place on the disk (a hole) gets none in the copy.

    Raises:
        OutputError: The disk is full, or broken.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as old, target.open("wb") as new:
            for start, end in _parts_with_data(old.fileno(), source.stat().st_size):
                old.seek(start)
                new.seek(start)
                while start < end and (content := old.read(min(_AT_ONCE, end - start))):
                    start += new.write(content)
            new.truncate(source.stat().st_size)


def _parts_with_data(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the last byte of each part of a file that is no hole."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
        except AttributeError:  # no such thing on Windows
            start, end = 0, size
        except OSError as error:
            if error.errno == errno.ENXIO:  # the rest is a hole
                return
            raise
        yield start, end


def _take_owner(path: Path, like: os.stat_result, mode: int) -> None:
    """Give a file or directory the group of another, if this user may, and mode bits."""
    if os.name == "posix" and path.stat().st_gid != like.st_gid:
        with contextlib.suppress(PermissionError):
            os.chown(path, -1, like.st_gid)
    path.chmod(mode)


def _umask_mode(directory: Path) -> int:
    """Return the mode that the umask gives to new files in a directory."""
    probe = directory / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _chmod_and_sync(directory: Path) -> None:
    """Give all files in a directory the mode that the umask gives, and sync them."""
    mode = _umask_mode(directory)
    for folder, _, files in walk(directory, topdown=False):
        for name in files:
            path = Path(folder, name)
            path.chmod(mode)
            _sync(path)
        _sync_directory(Path(folder))


def _swap(new: Path, target: Path, *, overwrite: bool) -> None:
    """Move a directory to its place; an old one there ends up beside it, and is removed."""
    if not overwrite or not target.exists():
        new.rename(target)  # fails if another process has filled it meanwhile
        _sync_directory(target.parent)
        return
    old = aside(new)
    try:
        if exchange(new, target):
            old = new
        else:
            _rename_twice(new, target, old)
        _sync_directory(target.parent)
    finally:
        if target.exists():
            remove(old)
    if old.exists():
        warnings.warn(f"the old content of {target} could not be removed from {old}", stacklevel=4)


def _rename_twice(new: Path, target: Path, old: Path) -> None:
    """Set the target aside, and move the new directory to its place; the old one comes back if that fails."""
    target.rename(old)
    try:
        new.rename(target)
    finally:
        if not target.exists():
            old.rename(target)


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
