"""The files of one adapter: its configuration, and its tensors, each read when it is asked for."""

from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.errors import AdapterError, AdapterNotFoundError
from pcb_peft.files.json_text import parse_json, read_json_file
from pcb_peft.files.pickled import open_pickled
from pcb_peft.files.tensors import (
    ReadFinite,
    SafetensorsFile,
    Tensors,
    TensorsInMemory,
    check_finite,
    read_finite,
)

__all__ = [
    "CONFIG",
    "OLD_PIPELINE",
    "PICKLE",
    "PICKLED",
    "PIPELINE",
    "PIPELINE_TYPE",
    "SAFETENSORS",
    "ReadFinite",
    "SafetensorsFile",
    "Tensors",
    "TensorsInMemory",
    "Without",
    "check_finite",
    "open_pipeline_file",
    "open_tensors",
    "read_config",
    "read_finite",
]

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PIPELINE = "pytorch_lora_weights.safetensors"  # diffusers' file for the LoRAs of a pipeline
OLD_PIPELINE = "pytorch_lora_weights.bin"
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
"""Ends of names of pickled files; anything else is read as safetensors."""
PIPELINE_TYPE = "DIFFUSERS"
AGAIN = "save the adapter again"


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


def open_pipeline_file(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Open the file of a LoRA of a diffusion pipeline: its metadata, as a configuration, and its tensors.

    Raises:
        AdapterError: It is damaged, or a pickled file that holds anything but named tensors.
    """
    if path.suffix in PICKLED:
        return {"peft_type": PIPELINE_TYPE, "metadata": {}, "file_metadata": {}}, open_pickled(path)
    file = SafetensorsFile(path)
    return _pipeline_config(file), file


def _pipeline_config(file: SafetensorsFile) -> dict[str, Any]:
    stated = file.metadata().get("lora_adapter_metadata") or "{}"
    where = f"{file.where}: lora_adapter_metadata"
    metadata = parse_json(stated, where, AdapterError, AGAIN)
    if not isinstance(metadata, dict):
        raise AdapterError(f"{where} must be an object with names; {AGAIN}")
    return {"peft_type": PIPELINE_TYPE, "metadata": metadata, "file_metadata": file.metadata()}


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration as PEFT wrote it, its keys in the file's order: the first pattern that fits counts."""
    config = read_json_file(path, AdapterError, AGAIN)
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
    return open_pickled(path)
