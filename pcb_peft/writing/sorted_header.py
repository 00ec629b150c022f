"""Metadata of a safetensors file in alphabetical order: safetensors writes them in another order each time."""

import json
import struct
from pathlib import Path

LENGTH = struct.Struct("<Q")  # of the header, before it


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a file in place; the same tensors and metadata then give the same bytes.

    The header stays as long as it is.
    """
    with path.open("r+b") as file:
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        header = json.loads(file.read(length))
        if len(header.get("__metadata__", {})) < 2:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # longer: characters that safetensors escapes in another way
            file.seek(LENGTH.size)
            file.write(text.ljust(length))
