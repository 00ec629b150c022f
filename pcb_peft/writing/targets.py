"""The place of an output: what may be replaced there, and what never is.

An output must not contain an input, nor lie in one. What stands in its place is replaced only if a user allows it, and
then only what this package wrote, unless the user says "all".
"""

import contextlib
import errno
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import safetensors

from pcb_peft.errors import NoSpaceError, OutputError
from pcb_peft.runtime.paths import current_directory, expanded
from pcb_peft.writing.manifest import foreign_file

Overwrite: TypeAlias = bool | Literal["all"]
"""True: replace what this package wrote. "all": replace whatever is there."""

Inputs: TypeAlias = Iterable[object]
"""Paths of what an output is made from; hub ids, and objects in memory, are no paths and are passed over."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_ALL = "allow everything there to be deleted: overwrite='all', --overwrite-all"


def check_target(target: Path, *, overwrite: Overwrite, inputs: Inputs = ()) -> None:
    """Raise OutputError where a directory cannot take the place of `target`, or must not.

    Args:
        target: The directory that is to be written.
        overwrite: What may be replaced.
        inputs: What the output is made from.
    """
    with writing(target):
        target = resolved(target)
        here = current_directory()
        if here is not None and here.resolve().is_relative_to(target):
            raise OutputError(
                f"{target} is the current directory or lies above it; name a directory of its own"
            )
        if target.is_mount():
            raise OutputError(
                f"{target} is a mount point and cannot be replaced; name a directory in it"
            )
        refuse_inputs(target, inputs)
        if not target.exists():
            return
        if not target.is_dir():
            raise OutputError(f"{target} is a file; name a directory")
        if not any(target.iterdir()) or overwrite == "all":
            return
        if not overwrite:
            raise OutputError(
                f"{target} exists and is not empty; name another directory, "
                "or allow its replacement: overwrite=True, --overwrite"
            )
        if (name := foreign_file(target)) is not None:
            raise OutputError(
                f"{target} holds {name}, which pcb_peft did not write, or not as it is now; name another directory, or "
                f"{_ALL}"
            )


def check_file_target(
    target: Path,
    *,
    overwrite: Overwrite,
    inputs: Inputs = (),
    is_ours: Callable[[Path], bool] = lambda _: True,
) -> None:
    """Raise OutputError where a file cannot take the place of `target`, or must not.

    Args:
        target: The file that is to be written.
        overwrite: What may be replaced.
        inputs: What the output is made from.
        is_ours: Tells whether this package wrote the file that is there.
    """
    with writing(target):
        refuse_inputs(resolved(target), inputs)
        if target.is_dir():
            raise OutputError(f"{target} is a directory; name a file in it")
        if target.exists() and not target.is_file():
            raise OutputError(f"{target} is a device or a pipe; name a file")
        folder = resolved(target).parent
        if not folder.is_dir():
            raise OutputError(f"{target} lies in {folder}, which does not exist; make it first")
        if not os.access(folder, os.W_OK):
            raise OutputError(
                f"{target} lies in {folder}, which cannot be written; name another file"
            )
        if not target.exists() or overwrite == "all":
            return
        if not overwrite:
            raise OutputError(
                f"{target} exists; name another file, or allow its replacement: overwrite=True, --overwrite"
            )
        if not is_ours(target):
            raise OutputError(
                f"{target} is a file that pcb_peft did not write; name another file, or {_ALL}"
            )


def existing(*given: object) -> tuple[str, ...]:
    """Return those of the paths that exist, as absolute paths: an adapter remembers them as its inputs."""
    paths = (expanded(one) for one in given if isinstance(one, str | Path) and str(one))
    return tuple(dict.fromkeys(os.path.abspath(path) for path in paths if _exists(path)))  # noqa: PTH100  (no link followed)


def refuse_inputs(target: Path, inputs: Inputs) -> None:
    """Raise OutputError where an output would contain an input, or lie in one.

    Paths are compared as files on the disk, so that links and mounts do not hide an input.
    """
    for path in map(Path, existing(*inputs)):
        for place in {path, path.resolve()}:
            if _is_in(place, target):
                raise OutputError(
                    f"{target} contains {path}, from which the output is made: name a directory elsewhere"
                )
            if _is_in(target, place):
                raise OutputError(
                    f"{target} lies in {path}, from which the output is made: name a directory elsewhere"
                )
        for link in _links_in(path):
            if _is_in(Path(os.path.realpath(link)), target):  # which may be a circle
                raise OutputError(
                    f"{target} contains what {link} leads to, from which the output is made: name a directory elsewhere"
                )


def resolved(target: Path) -> Path:
    """Return the path without links.

    Raises:
        OutputError: It cannot be a path.
    """
    if current_directory() is None and not expanded(target).is_absolute():
        raise OutputError(
            f"{target} lies in the current directory, which has been removed; go to another directory, or name the "
            "output by its whole path"
        )
    try:
        return expanded(target).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a zero byte
        raise OutputError(f"{target!s} cannot be the path of an output: {error}") from error


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Raise the errors of the file system as OutputError, and as NoSpaceError where the disk is full."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        code = getattr(error, "errno", None)
        full = code in _FULL or "(os error 28)" in str(error)  # safetensors keeps no number
        reason = getattr(error, "strerror", None) or error
        raise (NoSpaceError if full else OutputError)(
            f"{path} cannot be written: {reason}; make room, or name a directory elsewhere"
        ) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _links_in(directory: Path) -> Iterator[Path]:
    """Yield the links in a directory: files of an input may lie elsewhere.

    Those of a directory that cannot be read are unknown; it will be refused as an input.
    """
    with contextlib.suppress(PermissionError):
        if directory.is_dir():
            yield from (path for path in directory.iterdir() if path.is_symlink())


def _is_in(inner: Path, outer: Path) -> bool:
    """Return whether a path is another, or lies in it."""
    if inner.is_relative_to(outer):
        return True
    identity = _identity(outer)
    return identity is not None and identity in map(_identity, (inner, *inner.parents))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
