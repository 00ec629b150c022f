"""The header of a safetensors file: names, dtypes and shapes of its tensors, read without a tensor library."""

import math
from pathlib import Path
from typing import Any

import msgspec

from pcb_peft.errors import PcbPeftError
from pcb_peft.files.json_text import parse_json
from pcb_peft.files.schema import Count, checked
from pcb_peft.runtime.shown import quoted, shown

LONGEST_NAME = 1000  # characters; those of real models have some 150
_MOST_BYTES = 100_000_000  # of a header; the library of safetensors reads no larger one
_BITS = {  # of a value; newer dtypes are left to the library
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


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
            text = stream.read(start - 8).decode("utf-8")
    except (OSError, ValueError) as error:
        raise error_type(f"{path} is damaged: {shown(error)}; {way_out}") from error
    header: Any = parse_json(text, f"{path}: its header", error_type, way_out)
    texts = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    checked(texts, dict[str, str], f"{path}: __metadata__", error_type, way_out)
    entries = checked(header, dict[str, Entry], str(path), error_type, way_out)
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        check_name(name, path, error_type)
        begin, end = entry.data_offsets
        bits = _BITS.get(entry.dtype, 0) * math.prod(entry.shape)
        if begin != place or end < begin or (entry.dtype in _BITS and 8 * (end - begin) != bits):
            raise error_type(
                f"{path} is damaged: the bytes of {name} are {begin} to {end}, which do not follow those before it, or "
                f"hold no {entry.dtype} of the shape {entry.shape}; {way_out}"
            )
        place = end
    if place != size - start:
        raise error_type(
            f"{path} is damaged: its tensors have {place} bytes, and {size - start} are there; {way_out}"
        )
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
