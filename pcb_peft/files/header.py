"""The header of a safetensors file: names, dtypes and shapes of its tensors, read without a tensor library."""

import json
from pathlib import Path
from typing import Any


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and the place of the first tensor's bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged: cut, or no JSON.
        RecursionError: It is nested too deeply.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if start > size:
            raise ValueError("its header is cut")
        return json.loads(stream.read(start - 8)), start
