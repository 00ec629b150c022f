"""Directories and files that appear whole or not at all."""

import concurrent.futures
import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

from pcb_peft.errors import OutputError
from pcb_peft.runtime.processes import Processes

_SYNCED_AT_ONCE = 64 << 20


@contextlib.contextmanager
def replace_directory(target: Path, *, overwrite: bool) -> Generator[Path]:
    """Yield a temporary directory that takes the place of `target` once the block ends without an exception.

    It lies beside the target, under a new name each time, so that the remains of a killed run are never used. At the
    end every file gets the mode that the umask gives and is synced, then the directory is renamed. Until that rename
    `target` is untouched.

    Args:
        target: Directory to write. A symbolic link is followed and stays.
        overwrite: Replace `target` even though it holds something. An empty directory is always replaced.

    Raises:
        OutputError: `target` cannot be replaced, or holds something and `overwrite` is False.
    """
    target = target.resolve()
    check_target(target, overwrite=overwrite)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        _make(temporary)
        yield temporary
        with _writing(target):
            _chmod_and_sync(temporary)
        check_target(target, overwrite=overwrite)
        _swap(temporary, target)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def shared_directory(target: Path, processes: Processes, *, overwrite: bool) -> Generator[Path]:
    """Yield a directory as `replace_directory` does, in which several processes write; the first makes and renames it.

    Raises:
        OutputError: Also where the processes have no file system in common.
    """
    with contextlib.ExitStack() as stack:
        made = None
        if processes.is_main:
            made = stack.enter_context(replace_directory(target, overwrite=overwrite))
        directory = processes.reduce(made, lambda paths: paths[0])
        if directory is None or not directory.is_dir():
            raise OutputError(
                f"{directory} was made by the first process, and this process does not see it: "
                "name a directory on a file system that all machines share"
            )
        yield directory
        processes.barrier()
    processes.barrier()


def write_file_atomically(target: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Write a file that appears whole or not at all.

    It is written beside the target under another name, gets the mode that the umask gives, is synced, and then renamed:
    a run that is killed leaves the old file.

    Args:
        target: The file. A symbolic link is followed and stays.
        write: Writes the content to the path that it is given.
        overwrite: Replace `target` if it exists.

    Raises:
        OutputError: `target` cannot be written, or must not be replaced.
    """
    check_file_target(target, overwrite=overwrite)
    target = target.resolve()
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _writing(target):
            temporary.touch()
            mode = temporary.stat().st_mode & 0o666
            write(temporary)
            temporary.chmod(mode)
            _sync(temporary, os.O_RDWR)
        check_file_target(target, overwrite=overwrite)
        with _writing(target):
            temporary.replace(target)
            _sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_file_target(target: Path, *, overwrite: bool) -> None:
    """Raise OutputError if a file cannot be written at `target`, or must not be replaced."""
    if target.is_dir():
        raise OutputError(f"{target} is a directory; name a file in it")
    folder = target.resolve().parent
    if not folder.is_dir():
        raise OutputError(f"{target} lies in {folder}, which does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{target} lies in {folder}, which cannot be written; name another file")
    if target.exists() and not overwrite:
        raise OutputError(
            f"{target} exists; name another file, or allow its replacement: overwrite=True, --overwrite"
        )


class GrowingFile:
    """A new file that is synced while it is written, so that little is left to sync at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _writing(path):
            self._stream = path.open("wb", buffering=0)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)  # starts when there is work
        self._sync: concurrent.futures.Future[None] | None = None
        self._unsynced = 0

    def write(self, content: bytes | memoryview) -> None:
        """Append to the file.

        Raises:
            OutputError: The disk is full, or broken.
        """
        unwritten = memoryview(content).cast("B")
        self._unsynced += len(unwritten)
        with _writing(self._path):
            while unwritten:
                unwritten = unwritten[self._stream.write(unwritten) :]
            if self._unsynced >= _SYNCED_AT_ONCE and self._is_synced():
                self._sync = self._thread.submit(os.fsync, self._stream.fileno())
                self._unsynced = 0

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        with _writing(self._path):
            self._stream.close()
            self._is_synced()

    def _is_synced(self) -> bool:
        """Return whether the last sync is done; raise its error."""
        return self._sync is None or (self._sync.done() and self._sync.result() is None)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise OutputError where a directory cannot take the place of `target`, or must not."""
    target = target.resolve()
    if Path.cwd().resolve().is_relative_to(target):
        raise OutputError(
            f"{target} is the current directory or lies above it; name a directory of its own"
        )
    if target.is_mount():
        raise OutputError(
            f"{target} is a mount point and cannot be replaced; name a directory in it"
        )
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file; name a directory")
    if not overwrite and any(target.iterdir()):
        raise OutputError(
            f"{target} exists and is not empty; name another directory, "
            "or allow its replacement: overwrite=True, --overwrite"
        )


def _make(directory: Path) -> None:
    """Make a directory, with the mode that the umask gives."""
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{directory.parent} cannot be written: {error.strerror}") from error


def _remove(directory: Path) -> None:
    """Remove a directory, also if the signal that ends the process comes meanwhile."""
    try:
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _writing(path: Path) -> Generator[None]:
    """Raise the errors of the file system as OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; make room, or name a directory elsewhere"
        ) from error


def _chmod_and_sync(directory: Path) -> None:
    """Give all files in a directory the mode that the umask gives, and sync them."""
    mode = directory.stat().st_mode & 0o666
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            path = Path(folder, name)
            path.chmod(mode)
            _sync(path, os.O_RDWR)
        _sync_directory(Path(folder))


def _swap(new: Path, target: Path) -> None:
    """Rename `new` to `target`; the old target comes back if that fails."""
    aside = new.with_suffix(".old")
    try:
        if target.exists():
            target.rename(aside)
        new.rename(target)
        _sync_directory(target.parent)
    finally:
        if aside.exists() and not target.exists():
            aside.rename(target)
        _remove(aside)


def _sync_directory(directory: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        _sync(directory, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a directory, by their relative paths."""
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
