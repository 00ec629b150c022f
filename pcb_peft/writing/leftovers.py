"""Temporary directories beside an output, and what becomes of those whose run was killed.

The temporary directory of ``merged`` is ``.merged.<number>.tmp``. The run that makes it keeps a lock on it, which the
kernel lifts when the run ends, however it ends: a directory without a lock is a leftover. The next run for the same
output finds it, says so, and removes it. Where a run was killed while it replaced a directory in two renames (see
`pcb_peft.writing.atomic`), the next run finishes what it began.
"""

import contextlib
import hashlib
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeAlias

from pcb_peft.writing.locks import lock_of
from pcb_peft.writing.targets import writing

TEMPORARY, ASIDE = ".tmp", ".old"
Continued: TypeAlias = Callable[[Path], bool]
"""Tells whether a temporary directory holds what this run can go on from."""

_ANEW = (
    "; it held no whole shard of the same fold (the same base model, adapter, options and versions), so that this one "
    "starts anew"
)
_LONGEST_NAME = 200  # bytes; a file system allows 255, and the rest of a temporary name needs some


def aside(temporary: Path) -> Path:
    """Return the name that the old directory has while the new one takes its place."""
    return temporary.with_suffix(ASIDE)


def never(_: Path) -> bool:
    """Go on from nothing that a killed run left."""
    return False


@contextlib.contextmanager
def temporary_directory(
    target: Path, mode: int = 0o777, continued: Continued = never
) -> Generator[Path]:
    """Yield a directory beside `target`, locked; it is removed at the end if it is still there.

    Args:
        target: The output, without links in its path.
        mode: Mode bits of a new directory, as far as the umask allows them.
        continued: Tells whether the directory of a killed run is taken over, in place of a new one. One that could be
            is left there, and said in a warning, if the block ends with an exception.
    """
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    path, lock = _left_by_a_killed_run(target, continued) or _made(target, mode)
    remains = False
    try:
        yield path
    except BaseException:
        remains = continued(path)
        if remains:
            warnings.warn(f"{path} is left there, for a run that continues it", stacklevel=2)
        raise
    finally:
        try:
            if not remains:
                remove(path)
        finally:
            if not remains:
                remove(path)  # once more, if a signal came meanwhile
            if lock is not None:
                os.close(lock)


def repair(target: Path, continued: Continued = never) -> None:
    """Remove what killed runs left beside an output, or finish what they began; each is said in a warning.

    Args:
        target: The output, without links in its path.
        continued: Tells whether a temporary directory is left there, because this run goes on from it.
    """
    for number in sorted({path.stem for path in _leftovers(target)}):
        temporary = target.with_name(number + TEMPORARY)
        old = aside(temporary)
        with _taken_over(temporary) as dead:
            if dead and (old.exists() or not continued(temporary)):
                _repair(target, temporary, old, "" if continued is never else _ANEW)


def _left_by_a_killed_run(target: Path, continued: Continued) -> tuple[Path, int] | None:
    """Lock and return the temporary directory of a killed run that is continued; None if there is none."""
    for path in sorted(_leftovers(target)):
        try:
            lock = lock_of(path)
        except OSError:  # its run is alive
            continue
        if lock is None:  # no locks here, so nobody knows
            continue
        if path.suffix == TEMPORARY and continued(path):
            return path, lock
        os.close(lock)
    return None


def _made(target: Path, mode: int) -> tuple[Path, int | None]:
    """Make and lock a new temporary directory."""
    while True:
        path = target.with_name(f"{_prefix(target)}{uuid.uuid4().hex}{TEMPORARY}")
        try:
            path.mkdir(mode=mode)
            try:
                return path, lock_of(path)
            except (BlockingIOError, FileNotFoundError):  # a run that cleans up was quicker
                continue
        except BaseException:
            remove(path)
            raise


def remove(directory: Path) -> None:
    """Remove a directory as far as that is possible."""
    shutil.rmtree(directory, ignore_errors=True)


def _repair(target: Path, temporary: Path, old: Path, why: str) -> None:
    if old.is_dir() and not target.exists():
        new = temporary.is_dir()  # complete: the old directory is set aside only then
        with contextlib.suppress(OSError):
            (temporary if new else old).rename(target)
        state = "its new content is there now" if new else "its old content is there again"
        warnings.warn(f"a run was killed while it replaced {target}: {state}", stacklevel=2)
        if target.exists():  # nothing is removed before the output is there
            remove(old)
        return
    for path in (temporary, old):
        if path.exists():
            remove(path)
            state = "could not be removed" if path.exists() else "was removed"
            warnings.warn(
                f"{path}, which a killed run for {target} had left, {state}{why}", stacklevel=2
            )


def _prefix(target: Path) -> str:
    """Return the beginning of the names of an output's temporary directories."""
    name = os.fsencode(target.name)
    if len(name) > _LONGEST_NAME:
        return f".{hashlib.sha256(name).hexdigest()}."
    return f".{target.name}."


def _leftovers(target: Path) -> list[Path]:
    """Return the temporary directories of an output, of live runs too."""
    pattern = re.compile(
        re.escape(_prefix(target)) + rf"[0-9a-f]{{32}}({re.escape(TEMPORARY)}|{re.escape(ASIDE)})"
    )
    try:
        return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []


@contextlib.contextmanager
def _taken_over(temporary: Path) -> Generator[bool]:
    """Yield whether the run that made a temporary directory is dead; if so, nobody else repairs it meanwhile."""
    try:
        lock = lock_of(temporary)
    except FileNotFoundError:  # only its old directory is left
        yield True
        return
    except OSError:  # it is alive
        yield False
        return
    if lock is None:  # no locks here, so nobody knows
        yield False
        return
    try:
        yield True
    finally:
        os.close(lock)
