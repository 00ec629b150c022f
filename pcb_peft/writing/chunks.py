"""Chunks of a changed file, each made by one thread, and written one after another."""

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

CHUNK_VALUES = 1 << 20  # of two bytes each: about as much as a core's cache holds
_CHUNK_BYTES = 1 << 21


def read_tensor(source: Path, tensor: TensorInfo) -> Tensor:
    """Read a tensor of floating-point numbers of another file."""
    values = torch.empty(tensor.shape, dtype=SAFETENSORS_FLOATS[tensor.dtype])
    _read_into(values, source, tensor.begin)
    return values


def copy_chunks(source: Path, begin: int, end: int) -> Iterator[Chunk]:
    """Yield chunks that copy bytes `begin` to `end` of another file."""
    for start in range(begin, end, _CHUNK_BYTES):
        buffer = torch.empty(min(end - start, _CHUNK_BYTES), dtype=torch.uint8)
        yield functools.partial(_read_into, buffer, source, start)


def sum_chunks(
    source: Path, tensor: TensorInfo, deltas: Sequence[Delta], name: str
) -> Iterator[Chunk]:
    """Yield chunks that add deltas to a matrix of another file.

    Args:
        source: The file.
        tensor: Place of the matrix.
        deltas: Changes of its rows, from top to bottom.
        name: Name of the parameter, for messages.
    """
    begin = tensor.begin
    for delta in deltas:
        rows, cols = delta.shape
        buffer = torch.empty(rows, cols, dtype=SAFETENSORS_FLOATS[tensor.dtype])
        yield functools.partial(_sum, source, begin, buffer, delta, name)
        begin += buffer.nbytes


def value_chunks(values: Tensor, name: str) -> Iterator[Chunk]:
    """Yield chunks of values that are in memory; `name` is that of the parameter, for messages."""
    refuse_infinite(values, name)
    content = _as_bytes(values)
    for start in range(0, len(content), _CHUNK_BYTES):
        yield functools.partial(content.__getitem__, slice(start, start + _CHUNK_BYTES))


def refuse_infinite(values: Tensor, name: str) -> None:
    """Raise MismatchError where the base model's dtype cannot hold the values of a parameter."""
    if not all_finite(values):
        raise MismatchError(
            f"{name} would hold NaN or infinite values, beyond what {values.dtype} holds; "
            "give the base in bfloat16 or float32"
        )


def _sum(source: Path, begin: int, buffer: Tensor, delta: Delta, name: str) -> memoryview:
    _read_into(buffer, source, begin)
    refuse_infinite(delta.apply_(buffer), name)
    return _as_bytes(buffer)


def _read_into(buffer: Tensor, source: Path, begin: int) -> memoryview:
    """Read bytes of a file into a buffer.

    The caller's thread makes the buffer and frees it: memory that another thread frees would not be used again.
    """
    content = _as_bytes(buffer)
    with source.open("rb", buffering=0) as stream:
        stream.seek(begin)
        if stream.readinto(content) != len(content):
            raise BaseModelError(f"{source} became shorter while it was read")
    return content


def _as_bytes(values: Tensor) -> memoryview:
    return values.contiguous().flatten().view(torch.uint8).numpy().data
