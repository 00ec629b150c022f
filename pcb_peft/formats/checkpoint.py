"""The files of one adapter: its configuration, and its tensors, read when asked for."""

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from pcb_peft.deltas.dtypes import SAFETENSORS_FLOATS
from pcb_peft.deltas.linalg import all_finite
from pcb_peft.errors import AdapterError, OptionError

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PIPELINE = "pytorch_lora_weights.safetensors"  # diffusers' name for LoRAs of a pipeline
PIPELINE_TYPE = "DIFFUSERS"


class Tensors(Protocol):
    """Named tensors of which shape and dtype are known before the data is read; `where`, for messages."""

    where: str

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...


class SafetensorsFile:
    """Tensors of a safetensors file, read one by one."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safetensors.safe_open(str(path), framework="pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise AdapterError(f"{path} is not a readable safetensors file: {error}") from error
        self.where = str(path)

    def metadata(self) -> dict[str, str]:
        """What the file says beside its tensors."""
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
    """Tensors, but for some."""

    def __init__(self, tensors: Tensors, left_out: Container[str]) -> None:
        self._left_out, self.where = left_out, tensors.where
        self.shape, self.dtype, self.read = tensors.shape, tensors.dtype, tensors.read
        self._names = tensors.names

    def names(self) -> list[str]:
        return [name for name in self._names() if name not in self._left_out]


def pipeline_config(file: SafetensorsFile) -> dict[str, Any]:
    """What stands for the configuration of a LoRA of a diffusion pipeline: the metadata in its file."""
    stated = file.metadata().get("lora_adapter_metadata") or "{}"
    try:
        return {"peft_type": PIPELINE_TYPE, "metadata": json.loads(stated)}
    except ValueError as error:
        raise AdapterError(f"lora_adapter_metadata cannot be read: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The configuration, as PEFT wrote it; the order of its keys is kept, since patterns depend on it."""
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
    """The adapter's tensors, from safetensors if there are any, else from a pickled file without running code."""
    if (directory / SAFETENSORS).is_file():
        return SafetensorsFile(directory / SAFETENSORS)
    path = directory / PICKLE
    if not path.is_file():
        raise AdapterError(f"{directory} has neither {SAFETENSORS} nor {PICKLE}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterError(f"{path} cannot be loaded with weights_only=True: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise AdapterError(f"{path} holds something else than named tensors")
    return TensorsInMemory(tensors, str(path))


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, each contiguous and in memory of its own, as safetensors wants them."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, values in tensors.items():
        values = values.contiguous()
        storage = values.untyped_storage()
        if storage.nbytes() > values.nbytes or storage.data_ptr() in taken:
            values = values.clone()
        taken.add(storage.data_ptr())
        found[name] = values
    return found


def refuse_overflow(tensors: Mapping[str, Tensor]) -> None:
    """Raises OptionError where tensors that are to be written hold values beyond those of their dtype."""
    for name, values in tensors.items():
        if not all_finite(values):
            raise OptionError(
                f"{name} has values beyond those of {values.dtype}: save it in bfloat16 or float32"
            )
