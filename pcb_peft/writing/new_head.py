"""A head that a base model has no place for: a folded model gets it, and becomes a model of the head's class."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from pcb_peft.base.architecture import TRANSFORMERS_ERRORS
from pcb_peft.base.config import bounded_modules
from pcb_peft.base.fitting_head import model_with_head
from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.dtypes import SAFETENSORS_FLOATS
from pcb_peft.deltas.replacements import ReplacedParameter, Replacements
from pcb_peft.writing.edits import ReplaceParameter
from pcb_peft.writing.shards import CheckpointEdit


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class NewHead:
    """A head that is added to a checkpoint.

    Attributes:
        parameters: Path of a parameter to its values.
        config: Fields of ``config.json`` that say which class has this head, and the names of its classes.
    """

    parameters: Mapping[str, ReplacedParameter] = dataclasses.field(
        default_factory=dict[str, ReplacedParameter]
    )
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def add_to(self, checkpoint: CheckpointEdit, base: BaseModel) -> None:
        """Add the parameters to the edits of a checkpoint: into the file, and in the dtype, of a small tensor there."""
        floats = {n: t for n, t in base.tensors.items() if t.dtype in SAFETENSORS_FLOATS}
        beside = min(floats, key=lambda name: (floats[name].end - floats[name].begin, name))
        for name, new in self.parameters.items():
            checkpoint.edits[name] = ReplaceParameter(new)
            checkpoint.shapes[name] = new.shape
            checkpoint.added[name] = beside


def new_head(base: BaseModel, head: Replacements, class_name: str | None) -> NewHead:
    """Return a head as a part of a checkpoint; an empty one if the class of transformers has no such parameters.

    Args:
        base: The base model, which has no place for the head.
        head: The head.
        class_name: Class of transformers that has it, which may be an automatic one.
    """
    if class_name is None or not (head.parameters and base.config):
        return NewHead()
    shapes = {name: new.shape for name, new in head.parameters.items()}
    model = model_with_head(shapes, lambda classes: _built(base, class_name, classes))
    if model is None or not _finds(model, base):
        return NewHead()
    return NewHead(head.parameters, _fields(model, base, head.task.labels))


def _finds(model: Any, base: BaseModel) -> bool:
    """Return whether a class finds the base model's weights: in files without a prefix, or with its own.

    Transformers 4 reads no files in which the head alone has its whole name.
    """
    import transformers

    prefix = base.names.skeleton.prefix
    bare = not any(name.startswith(f"{prefix}.") for name in base.tensors)
    if bare:
        return not transformers.__version__.startswith("4.")
    return model.base_model_prefix == prefix


def _built(base: BaseModel, class_name: str, classes: int) -> Any:
    """Build a model with so many classes, without values; None if there is none."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base.directory, trust_remote_code=False)
        config.num_labels = classes
        named: Any = getattr(transformers, class_name)
        with torch.device("meta"), bounded_modules():
            if hasattr(named, "from_config"):
                return named.from_config(config, trust_remote_code=False)
            return named(config)
    except (ImportError, *TRANSFORMERS_ERRORS):
        return None


def _fields(model: Any, base: BaseModel, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of ``config.json`` by which transformers builds this model."""
    fields: dict[str, Any] = {"architectures": [type(model).__name__]}
    classes = model.config.num_labels
    stated = len(base.config.get("id2label") or range(2))  # transformers' default
    if labels or classes != stated:
        names = labels if len(labels) == classes else [f"LABEL_{n}" for n in range(classes)]
        fields["id2label"] = {str(number): name for number, name in enumerate(names)}
        fields["label2id"] = {name: number for number, name in enumerate(names)}
    return fields
