"""Edits of parameters that the files hold in another arrangement: made in memory, written as the files have them."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from pcb_peft.base.conversions import Conversion
from pcb_peft.base.model import BaseModel
from pcb_peft.errors import MismatchError
from pcb_peft.writing.edits import TensorEdit


class ConvertedEdits:
    """The edits of all parameters of one conversion; the values that they make last are kept for its other files."""

    def __init__(
        self, conversion: Conversion, edits: Mapping[str, TensorEdit], base: BaseModel
    ) -> None:
        """Take the edits.

        Args:
            conversion: The conversion.
            edits: Name in memory to the edit of the parameter.
            base: The base model.
        """
        self._conversion, self._edits, self._base = conversion, edits, base
        self._latest: dict[tuple[str, torch.dtype], Tensor] = {}

    def values(self, file: str, dtype: torch.dtype) -> Tensor:
        """Return the new values of one of the files' tensors.

        Args:
            file: Its name in the files.
            dtype: Dtype in which they are computed.

        Raises:
            MismatchError: A parameter would have another shape.
        """
        if (file, dtype) not in self._latest:
            self._latest = {(name, dtype): new for name, new in self._compute(dtype).items()}
        return self._latest.pop((file, dtype))

    def _compute(self, dtype: torch.dtype) -> dict[str, Tensor]:
        conversion, base = self._conversion, self._base
        stored = {name: base.tensor(name).to(dtype) for name in conversion.files}
        shapes = {name: tuple(values.shape) for name, values in stored.items()}
        parameters = conversion.load(stored)
        for name, edit in self._edits.items():
            shape = parameters[name].shape
            parameters[name] = edit.apply(parameters[name].contiguous().clone())
            if parameters[name].shape != shape:
                raise MismatchError(
                    f"{name}: the adapter replaces it by {tuple(parameters[name].shape)}, the base has {tuple(shape)}; "
                    "give the base that the adapter was trained on, with its vocabulary"
                )
        return conversion.store(parameters, shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class ReplaceFile(TensorEdit):
    """Puts the values that edits in memory make in the place of a tensor of the files.

    Attributes:
        edits: The edits.
        file: Name of the tensor in the files.
    """

    edits: ConvertedEdits
    file: str

    def apply(self, values: Tensor) -> Tensor:
        return self.edits.values(self.file, values.dtype)
