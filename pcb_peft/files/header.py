"""The header of a safetensors file: names, dtypes and shapes of its tensors, read without a tensor library."""

import json
from pathlib import Path

import msgspec

from pcb_peft.errors import PcbPeftError
from pcb_peft.files.schema import Count, checked
from pcb_peft.runtime.shown import quoted, shown

LONGEST_NAME = 1000  # characters; those of real models have some 150
_MOST_BYTES = 100_000_000  # of a header; the library of safetensors reads no larger one


class Entry(msgspec.Struct):
    """A tensor in a header: its dtype (by safetensors' name), shape, and first and last byte after the header."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


def read_header(
    path: Path, error_type: type[PcbPeftError], way_out: str
) -> tuple[dict[str, Entry], int]:
    """Return the tensors that the header of a safetensors file names, and the place of the first one's bytes.

    Args:
        path: The file.
        error_type: Type of the error.
        way_out: What the user can do, for messages.

    Raises:
        PcbPeftError: Of that type: the file cannot be read, is cut, or its header is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            if start > min(size, _MOST_BYTES):
                raise error_type(f"{path} is damaged: its header is cut, or too long; {way_out}")
            header = json.loads(stream.read(start - 8))
    except (OSError, ValueError, RecursionError) as error:
        raise error_type(f"{path} is damaged: {shown(error)}; {way_out}") from error
    if isinstance(header, dict):
        header.pop("__metadata__", None)  # pyright: ignore[reportUnknownMemberType]
    entries = checked(header, dict[str, Entry], str(path), error_type, way_out)
    for name in entries:
        check_name(name, path, error_type)
    return entries, start


def check_name(name: str, where: str | Path, error_type: type[PcbPeftError]) -> None:
    """Raise an error of that type where the name of a tensor is too long, or holds control characters.

    It ends up in messages, in reports and in other files.
    """
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise error_type(
            f"{where}: {quoted(name)} cannot be the name of a tensor: it must have {LONGEST_NAME} characters at most, "
            "and none that cannot be printed; save the file again"
        )
