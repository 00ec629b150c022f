"""Strangers' GGUF files: what they state of themselves, and their tensors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcb_peft.errors import AdapterError, OptionError
from pcb_peft.files.json_text import first_bytes

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"


def gguf_library() -> Any:
    """Return the package ``gguf``.

    Raises:
        OptionError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise OptionError("GGUF needs the package gguf: pip install 'pcb-peft[gguf]'") from error
    return gguf


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does."""
    return first_bytes(path, len(MAGIC)) == MAGIC


def is_adapter(path: Path) -> bool:
    """Return whether a GGUF file is a LoRA, and no whole model."""
    return b"adapter.lora.alpha" in first_bytes(path, 1 << 12)


class GgufFile:
    """A GGUF file; tensors are read one by one, quantised ones as plain numbers."""

    def __init__(self, path: Path) -> None:
        """Open a file; its header is read, its tensors are not.

        Raises:
            AdapterError: It is no GGUF file, or is damaged.
            OptionError: The package gguf is not installed.
        """
        self._gguf, self.where = gguf_library(), str(path)
        try:
            reader = self._gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {one.name: one for one in reader.tensors}
        except (OSError, ValueError, KeyError, IndexError, TypeError, MemoryError) as error:
            raise AdapterError(
                f"{path} is no GGUF file, or is damaged: {error}; write it again"
            ) from error

    def names(self) -> list[str]:
        """Return the names of its tensors."""
        return list(self._tensors)

    def read(self, name: str) -> "Tensor":
        """Return the values of a tensor, float32."""
        import torch

        tensor = self._tensors[name]
        return torch.tensor(self._gguf.dequantize(tensor.data, tensor.tensor_type)).float()
