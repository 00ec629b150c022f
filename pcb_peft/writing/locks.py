"""Locks of files and directories: they end with the process that took them."""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock_of(path: Path) -> int | None:
    """Lock a file or directory until the returned descriptor is closed; None where this file system has no locks.

    Raises:
        BlockingIOError: Another process has locked it.
        FileNotFoundError: It is not there, or not any more.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.stat()  # while it waited for the lock, another run may have removed it
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
