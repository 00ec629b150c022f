"""A directory for what has to be saved only to be loaded again."""

import contextlib
import errno
import tempfile
from collections.abc import Generator
from pathlib import Path

from pcb_peft.errors import NoSpaceError, OutputError
from pcb_peft.runtime.processes import current

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def private_directory() -> Generator[str]:
    """Make a directory below ``$TMPDIR`` that is removed at the end.

    Raises:
        OutputError: No directory for temporary files can be written.
        NoSpaceError: It is full.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="pcb_peft_", ignore_cleanup_errors=True)
    except OSError as error:
        raise (NoSpaceError if error.errno in _FULL else OutputError)(
            f"no directory for temporary files can be written: {error.strerror}; set TMPDIR to one that can"
        ) from error
    with made as directory:
        try:
            yield directory
        except NoSpaceError as error:
            if directory not in str(error):
                raise
            raise NoSpaceError(
                f"{error}; temporary files are written into {tempfile.gettempdir()}, and elsewhere if TMPDIR says so"
            ) from error


@contextlib.contextmanager
def shared_directory() -> Generator[Path]:
    """Make a directory that all processes see; it is removed at the end. All must enter and leave together."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(private_directory()) if current().is_main else None
        yield Path(str(current().reduce(made, lambda names: names[0])))
        current().barrier()
