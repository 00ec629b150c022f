"""JSON from strangers: of a bounded size, without NaN where numbers are wanted, and with errors that say where."""

import json
from pathlib import Path
from typing import Any

from pcb_peft.errors import PcbPeftError
from pcb_peft.runtime.shown import shown

MOST_BYTES = (
    64 << 20
)  # of one file; the largest tokenizer.json is smaller, and no configuration comes near it


def parse_json(text: str, where: str, error_type: type[PcbPeftError], way_out: str) -> Any:
    """Return the content of a JSON text.

    Args:
        text: The text.
        where: Name of its place, for messages.
        error_type: Type of the error.
        way_out: What the user can do, for messages.

    Raises:
        PcbPeftError: Of that type: it is not JSON, or it is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise error_type(f"{where} is nested too deeply to be read; {way_out}") from error
    except ValueError as error:
        raise error_type(f"{where} is not JSON ({shown(error)}); {way_out}") from error


def read_json_file(path: Path, error_type: type[PcbPeftError], way_out: str) -> Any:
    """Return the content of a JSON file; arguments and errors are those of `parse_json`.

    Raises:
        PcbPeftError: Also where the file cannot be read, is not UTF-8, or is larger than 64 MiB.
    """
    return parse_json(read_text(path, error_type, way_out), str(path), error_type, way_out)


def read_text(
    path: Path, error_type: type[PcbPeftError], way_out: str, most_bytes: int | None = None
) -> str:
    """Return the text of a file in UTF-8; arguments and errors are those of `read_json_file`."""
    most_bytes = most_bytes or MOST_BYTES
    try:
        if path.is_dir() or (path.exists() and not path.is_file()):
            raise error_type(f"{path} cannot be read: it is not a file; {way_out}")
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) <= most_bytes:
            return content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise error_type(f"{path} cannot be read ({shown(error)}); {way_out}") from error
    raise error_type(f"{path} is larger than {most_bytes >> 20} MiB; {way_out}")
