"""JSON from strangers: of a bounded size and depth, without doubtful keys and texts, and with errors that say where."""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

from pcb_peft.errors import PcbPeftError
from pcb_peft.runtime.shown import shown

MOST_BYTES = 64 << 20
"""The size of a file at most; the largest tokenizer.json is smaller, and no configuration comes near it."""
_MOST_LEVELS = 100
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # how half a character (a surrogate) may be spelled


def parse_json(text: str, where: str, error_type: type[PcbPeftError], way_out: str) -> Any:
    """Return the content of a JSON text.

    Args:
        text: The text.
        where: Name of its place, for messages.
        error_type: Type of the error.
        way_out: What the user can do, for messages.

    Raises:
        PcbPeftError: Of that type: it is not JSON, it is nested too deeply to be read, a key is there twice with
            different values, or a text holds half a character.
    """
    try:
        content = json.loads(text, object_pairs_hook=_with_each_key_once)
        if _HALF.search(text):
            json.dumps(content, ensure_ascii=False).encode()
        if _levels(content) <= _MOST_LEVELS:
            return content
    except RecursionError as error:
        raise error_type(f"{where} is nested too deeply to be read; {way_out}") from error
    except UnicodeError as error:
        raise error_type(
            f"{where} holds a text with half a character (a surrogate); {way_out}"
        ) from error
    except ValueError as error:
        raise error_type(f"{where} is not JSON ({shown(error)}); {way_out}") from error
    raise error_type(f"{where} is nested too deeply to be read; {way_out}")


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; ValueError where a key is there twice: programs differ in which of its values they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        for key, value in pairs:
            if content[key] != value:
                raise ValueError(f"the key {shown(key)} is there twice, with different values")
    return content


def _levels(content: Any) -> int:
    """Return how deeply lists and objects are nested, without recursion."""
    levels, level = 0, [content]
    while level and levels <= _MOST_LEVELS:
        levels += 1
        holders = [one for one in level if isinstance(one, list | dict)]
        level = [
            inner for one in holders for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return levels


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
    content = read_bytes(path, error_type, way_out, most_bytes)
    try:
        return content.decode("utf-8")
    except UnicodeError as error:
        raise error_type(f"{path} cannot be read ({shown(error)}); {way_out}") from error


def read_bytes(
    path: Path, error_type: type[PcbPeftError], way_out: str, most_bytes: int | None = None
) -> bytes:
    """Return the bytes of a file; arguments and errors are those of `read_json_file`."""
    most_bytes = most_bytes or MOST_BYTES
    try:
        if path.is_dir() or (path.exists() and not path.is_file()):
            raise error_type(f"{path} cannot be read: it is not a file; {way_out}")
        if path.stat().st_size > most_bytes:
            raise _too_large(path, error_type, way_out, most_bytes)
        with path.open("rb") as file:
            # in parts: read(n) takes n bytes of memory, however few there are
            parts = iter(functools.partial(file.read, 1 << 20), b"")
            content = b"".join(itertools.islice(parts, (most_bytes >> 20) + 1))
        if len(content) <= most_bytes:
            return content
    except (OSError, ValueError) as error:
        raise error_type(f"{path} cannot be read ({shown(error)}); {way_out}") from error
    raise _too_large(path, error_type, way_out, most_bytes)


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first bytes of a file, by which its kind is known; none of what is no file.

    Raises:
        OSError: It cannot be read.
    """
    if not path.is_file():  # a pipe would be waited for
        return b""
    with path.open("rb") as file:
        return file.read(count)


def _too_large(
    path: Path, error_type: type[PcbPeftError], way_out: str, most_bytes: int
) -> PcbPeftError:
    return error_type(f"{path} is larger than {most_bytes >> 20} MiB; {way_out}")
