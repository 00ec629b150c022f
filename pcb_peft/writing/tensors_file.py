"""Safetensors files with their metadata in alphabetical order: safetensors writes them in another order each time."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

LENGTH = struct.Struct("<Q")  # of the header, before it


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the same tensors and metadata give the same bytes.

    Raises:
        OSError, SafetensorError: The disk is full, or broken. `writing` says of which output.
    """
    safetensors.torch.save_file(dict(tensors), path, metadata=dict(metadata) or None)
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
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
