"""Strangers' tensors: a safetensors file, a pickled file, or tensors in memory, all seen in one way.

What is read here holds weights: floating-point numbers, finite, in plain tensors that are as large as their file says.
Everything else is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import safetensors
import torch
from torch import Tensor

from pcb_peft.deltas.dtypes import WEIGHT_DTYPES
from pcb_peft.deltas.linalg import all_finite
from pcb_peft.errors import AdapterError
from pcb_peft.files.header import check_name
from pcb_peft.runtime.paths import why_unreadable
from pcb_peft.runtime.shown import shown
from pcb_peft.runtime.threads import one_thread

INTEGERS = (".alpha", ".on_input", "indices", ".num_batches_tracked")
"""Ends of the names of tensors that may hold integers: they are read as numbers, not as weights."""


class Tensors(Protocol):
    """Named tensors whose shape and dtype are known before the values are read; `where` names them in messages."""

    where: str

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...


class SafetensorsFile:
    """Tensors of a safetensors file, read one by one; pickled as the path, and opened again."""

    def __init__(self, path: str | Path) -> None:
        """Open a file; its header is checked, its values are not read.

        Raises:
            AdapterError: It is not a safetensors file, or is damaged.
        """
        self.where = str(path)
        if Path(path).exists() and not Path(path).is_file():
            raise AdapterError(f"{path} is not a readable safetensors file: it is not a file")
        try:
            self._file = safetensors.safe_open(self.where, framework="pt")
        except (
            OSError,
            ValueError,
            RuntimeError,
            MemoryError,
            safetensors.SafetensorError,
        ) as error:
            raise AdapterError(
                f"{path} is not a readable safetensors file: {why_unreadable(Path(path), error)}"
            ) from error
        for name in self._file.keys():  # noqa: SIM118  (it is no mapping)
            check_name(name, path, AdapterError)

    def __reduce__(self) -> tuple[type["SafetensorsFile"], tuple[str]]:
        return SafetensorsFile, (self.where,)

    def metadata(self) -> dict[str, str]:
        """Return the texts that the file holds beside its tensors."""
        return dict(self._file.metadata() or {})

    def names(self) -> list[str]:
        return sorted(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._file.get_slice(name).get_dtype()
        if stored not in WEIGHT_DTYPES:
            raise _not_weights(self.where, name, stored)
        return WEIGHT_DTYPES[stored]

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class TensorsInMemory:
    """Tensors of a live model, or of a pickled file."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self._tensors, self.where = tensors, where

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._tensors[name].dtype
        if dtype not in WEIGHT_DTYPES.values():
            raise _not_weights(self.where, name, str(dtype).removeprefix("torch."))
        return dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu()


def refuse_other_numbers(tensors: Tensors) -> None:
    """Raise AdapterError where a tensor holds anything but weights; only headers are read."""
    for name in tensors.names():
        if not name.endswith(INTEGERS):
            tensors.dtype(name)


_FLAT = (
    "DeepSpeed ZeRO-3 keeps each weight in parts, and the adapter was saved without gathering them; save it again with "
    "stage3_gather_16bit_weights_on_model_save, or rebuild it from the checkpoint with zero_to_fp32.py"
)
_NO_RANK = "it holds nothing, as of a LoRA of rank 0; leave its module out of the file, or save the adapter again"


def refuse_empty(tensors: Tensors) -> None:
    """Raise AdapterError where a tensor holds no values."""
    for name in tensors.names():
        shape = tensors.shape(name)
        if 0 in shape:
            raise AdapterError(
                f"{tensors.where}: {shown(name)} is empty (shape {shape}): {_FLAT if len(shape) == 1 else _NO_RANK}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class ReadFinite:
    """Reads one tensor in float32 each time it is called; errors are those of `read_finite`."""

    tensors: Tensors
    name: str

    def __call__(self) -> Tensor:
        return read_finite(self.tensors, self.name)


@one_thread()  # waking other threads for so little work would cost more than it saves
def read_finite(tensors: Tensors, name: str) -> Tensor:
    """Return a tensor in float32.

    Raises:
        AdapterError: It holds other numbers than weights, NaN, or infinite values.
    """
    if not name.endswith(INTEGERS):
        tensors.dtype(name)
    values = tensors.read(name).float()
    check_finite(values, tensors, name)
    return values


def check_finite(values: Tensor, tensors: Tensors, name: str) -> None:
    """Raise AdapterError where the values of a tensor hold NaN or infinity."""
    if not all_finite(values):
        raise AdapterError(f"{tensors.where}: {name} holds NaN or infinite values")


def _not_weights(where: str, name: str, dtype: str) -> AdapterError:
    return AdapterError(
        f"{where}: {shown(name)} holds numbers of type {dtype}; weights are floating-point numbers "
        f"({', '.join(sorted(WEIGHT_DTYPES))}): save the adapter again, not quantised"
    )
