"""The files that a search leaves, by which they are known again."""

from pathlib import Path

from pcb_peft.errors import OutputError
from pcb_peft.files.json_text import read_bytes

MARK = "written by pcb-peft search"
"""Stands in each of them: in a comment of a recipe, in the metadata of a picture."""


def is_from_a_search(path: Path) -> bool:
    """Return whether a search wrote a file."""
    return MARK.encode() in read_bytes(path, OutputError, "name another file")
