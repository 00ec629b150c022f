"""The files of one adapter: its configuration, and its tensors, each read when it is asked for."""

import dataclasses
import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from pcb_peft.deltas.dtypes import SAFETENSORS_FLOATS
from pcb_peft.deltas.linalg import all_finite
from pcb_peft.errors import AdapterError, AdapterNotFoundError
from pcb_peft.runtime.threads import one_thread

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PIPELINE = "pytorch_lora_weights.safetensors"  # diffusers' file for the LoRAs of a pipeline
PIPELINE_TYPE = "DIFFUSERS"


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
        self.where = str(path)
        try:
            self._file = safetensors.safe_open(self.where, framework="pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise AdapterError(f"{path} is not a readable safetensors file: {error}") from error

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
        return SAFETENSORS_FLOATS[self._file.get_slice(name).get_dtype()]

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
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu()


class Without:
    """Tensors without some of them."""

    def __init__(self, tensors: Tensors, left_out: Set[str]) -> None:
        self._tensors, self._left_out, self.where = tensors, left_out, tensors.where

    def names(self) -> list[str]:
        return [name for name in self._tensors.names() if name not in self._left_out]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(name)

    def read(self, name: str) -> Tensor:
        return self._tensors.read(name)


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
        AdapterError: It holds NaN or infinite values.
    """
    values = tensors.read(name).float()
    check_finite(values, tensors, name)
    return values


def check_finite(values: Tensor, tensors: Tensors, name: str) -> None:
    """Raise AdapterError where the values of a tensor hold NaN or infinity."""
    if not all_finite(values):
        raise AdapterError(f"{tensors.where}: {name} holds NaN or infinite values")


def pipeline_config(file: SafetensorsFile) -> dict[str, Any]:
    """Return the configuration of a LoRA of a diffusion pipeline: the metadata in its file."""
    stated = file.metadata().get("lora_adapter_metadata") or "{}"
    try:
        return {"peft_type": PIPELINE_TYPE, "metadata": json.loads(stated)}
    except ValueError as error:
        raise AdapterError(
            f"{file.where}: lora_adapter_metadata is not JSON ({error}); save the adapter again"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration as PEFT wrote it, its keys in the file's order: the first pattern that fits counts."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterError(
            f"{path} has no peft_type: it is not the configuration of a PEFT adapter"
        )
    return config


def open_tensors(directory: Path) -> Tensors:
    """Open an adapter's tensors: safetensors if there are any, else a pickled file, which runs no code."""
    if (directory / SAFETENSORS).is_file():
        return SafetensorsFile(directory / SAFETENSORS)
    path = directory / PICKLE
    if not path.is_file():
        raise AdapterNotFoundError(f"{directory} has neither {SAFETENSORS} nor {PICKLE}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterError(f"{path} cannot be loaded with weights_only=True: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise AdapterError(
            f"{path} must hold named tensors and nothing else; save the adapter with PEFT again"
        )
    return TensorsInMemory(tensors, str(path))
