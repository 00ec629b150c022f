"""A directory for what has to be saved only to be loaded again."""

import contextlib
import tempfile
from collections.abc import Generator
from pathlib import Path

from pcb_peft.runtime.processes import current


@contextlib.contextmanager
def shared_directory() -> Generator[Path]:
    """Make a directory that all processes see; it is removed at the end. All must enter and leave together."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(tempfile.TemporaryDirectory()) if current().is_main else None
        yield Path(str(current().reduce(made, lambda names: names[0])))
        current().barrier()
