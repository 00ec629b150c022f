"""Files that grow line by line: logs."""

import os
from pathlib import Path

from pcb_peft.writing.targets import writing


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, and make sure that it is on the disk.

    A line that a kill or a full disk cut off stays as it is, and the new one begins after it.

    Args:
        path: The file; it is made if it does not exist.
        line: The line, without its end.

    Raises:
        OutputError: The disk is full, or broken.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = pathlib.Path(folder, "log.jsonl")
        ...     _ = log.write_text('{"cut o')
        ...     append_line(log, '{"next": 2}')
        ...     log.read_text().splitlines()
        ['{"cut o', '{"next": 2}']
    """
    with writing(path), path.open("ab+") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        is_cut_off = size > 0 and stream.read(1) != b"\n"
        stream.write(f"\n{line}\n".encode() if is_cut_off else f"{line}\n".encode())
        stream.flush()
        os.fsync(stream.fileno())
