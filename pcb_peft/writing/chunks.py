"""What a changed file is made of: pieces, each made by one thread, and written one after another."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pcb_peft.base.files import TensorInfo
from pcb_peft.deltas.delta import Delta
from pcb_peft.deltas.dtypes import SAFETENSORS_FLOATS
from pcb_peft.deltas.linalg import all_finite
from pcb_peft.errors import BaseModelError, MismatchError

Chunk = Callable[[], memoryview]
"""Makes the next bytes of the file."""

CHUNK_VALUES = 1 << 20  # of two bytes: about what a core's cache holds
_CHUNK_BYTES = 1 << 21


def read(source: Path, span: TensorInfo) -> Tensor:
    """A tensor of floating-point numbers of another file, as a whole."""
    room = torch.empty(span.shape, dtype=SAFETENSORS_FLOATS[span.dtype])
    _bytes_of(source, span.begin, room)
    return room


def copied(source: Path, begin: int, end: int) -> Iterator[Chunk]:
    """Bytes `begin` to `end` of another file."""
    for start in range(begin, end, _CHUNK_BYTES):
        room = torch.empty(min(end - start, _CHUNK_BYTES), dtype=torch.uint8)
        yield functools.partial(_bytes_of, source, start, room)


def added(source: Path, span: TensorInfo, deltas: Sequence[Delta], name: str) -> Iterator[Chunk]:
    """A matrix of another file and what is added to it: the changes of its rows, from top to bottom."""
    begin = span.begin
    for delta in deltas:
        rows, cols = delta.shape
        room = torch.empty(rows, cols, dtype=SAFETENSORS_FLOATS[span.dtype])
        yield functools.partial(_sum, source, begin, room, delta, name)
        begin += room.nbytes


def whole(values: Tensor, name: str) -> Iterator[Chunk]:
    """Values that are there already."""
    refuse_infinite(values, name)
    content = _as_bytes(values)
    for start in range(0, len(content), _CHUNK_BYTES):
        yield functools.partial(content.__getitem__, slice(start, start + _CHUNK_BYTES))


def refuse_infinite(values: Tensor, name: str) -> None:
    """Raises MismatchError where the base's dtype cannot hold the values of a parameter."""
    if not all_finite(values):
        raise MismatchError(
            f"{name} would hold NaN or infinite values, beyond what {values.dtype} holds; "
            "give the base in bfloat16 or float32"
        )


def _sum(source: Path, begin: int, room: Tensor, delta: Delta, name: str) -> memoryview:
    _bytes_of(source, begin, room)
    refuse_infinite(delta.apply_(room), name)
    return _as_bytes(room)


def _bytes_of(source: Path, begin: int, room: Tensor) -> memoryview:
    """Reads into memory that the thread has which also gives it back: that is used again, others' is not."""
    content = _as_bytes(room)
    with source.open("rb", buffering=0) as stream:
        stream.seek(begin)
        if stream.readinto(content) != len(content):
            raise BaseModelError(f"{source} became shorter while it was read")
    return content


def _as_bytes(values: Tensor) -> memoryview:
    return values.contiguous().flatten().view(torch.uint8).numpy().data
