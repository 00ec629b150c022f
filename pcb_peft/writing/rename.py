"""Two paths that change places in one step, and a file that takes a free place: where the kernel can do that."""

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD = -100  # paths are relative to the current directory
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places, so that at no time one of them is missing.

    Returns:
        True if they have changed places; False where this system, or this file system, cannot do it.
    """
    return _renamed(one, other, _RENAME_EXCHANGE) == 0


def move_to_free_place(file: Path, target: Path) -> None:
    """Move a file to a place where there is none.

    Raises:
        FileExistsError: Another process has put one there. Where this system cannot tell, it is replaced.
    """
    code = _renamed(file, target, _RENAME_NOREPLACE)
    if code == errno.EEXIST:
        raise FileExistsError(code, os.strerror(code), str(target))
    if code != 0:
        file.replace(target)


def _renamed(one: Path, other: Path, flag: int) -> int:
    """Call the kernel; return 0, or the number of its error."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return errno.ENOSYS
    paths = os.fsencode(one), os.fsencode(other)
    result = renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], flag)
    return ctypes.get_errno() if result else 0


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """Return the C library's function; None where there is none (macOS, Windows, musl)."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
