"""A base model with deltas in its weights, of which no file is written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.delta import Delta
from pcb_peft.deltas.replacements import Replacements
from pcb_peft.errors import BaseModelError
from pcb_peft.writing.edits import TensorEdit
from pcb_peft.writing.fold_plan import plan_fold
from pcb_peft.writing.tied_weights import resolve_tied_edits


@dataclasses.dataclass(frozen=True, eq=False)
class FoldedModel(BaseModel):
    """A base model with deltas in its weights; made by `folded`.

    Attributes:
        below: The base model.
        edits: Parameter to the edit of its values.
    """

    below: BaseModel = dataclasses.field(kw_only=True)
    edits: Mapping[str, TensorEdit] = dataclasses.field(kw_only=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _on_top_of, (self.below, self.edits)

    def tensor(self, parameter: str) -> Tensor:
        """Read a parameter's values with the deltas in them: float32 where there are any, and not rounded."""
        values = self.below.tensor(parameter)
        if parameter not in self.edits:
            return values
        return self.edits[parameter].apply(values.float().clone())


def folded(deltas: Mapping[str, Delta], base: BaseModel, replaced: Replacements) -> FoldedModel:
    """Return the base model as `fold_deltas` would write it; arguments and errors are likewise.

    Raises:
        BaseModelError: Parameters would have other shapes, or `fold_deltas` raises it.
    """
    checkpoint = resolve_tied_edits(plan_fold(deltas, base, replaced), base, "refuse")
    if checkpoint.shapes:
        raise BaseModelError(
            f"{', '.join(checkpoint.shapes)} would have other shapes than in {base.source}: fold first, and "
            "give the folded model as the base"
        )
    return _on_top_of(base, checkpoint.edits)


def _on_top_of(below: BaseModel, edits: Mapping[str, TensorEdit]) -> FoldedModel:
    files = (below.source, below.directory, below.config, below.tensors)
    return FoldedModel(*files, below=below, edits=edits)
