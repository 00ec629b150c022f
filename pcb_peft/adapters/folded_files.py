"""The files of a folded model that are not the base model's: its card, and the tokenizer of a vocabulary that grew."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcb_peft.adapters.companions import (
    TEMPLATE,
    TOKENIZER,
    Companions,
    companion,
    companions_beside,
)
from pcb_peft.base.canonical import AUTO_CLASSES
from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.replacements import HEADS, Replacements
from pcb_peft.errors import UnsupportedError
from pcb_peft.formats.checkpoint import CONFIG
from pcb_peft.writing.model_card import CARD
from pcb_peft.writing.new_head import NewHead, new_head

CLASSES_WITH_HEADS = {task: AUTO_CLASSES[task] for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")}
"""Task types whose models have a head that other models lack, and the class of transformers for each."""

BASE_CARD = "BASE_README.md"


def folded_files(
    name: str, companions: Companions, base: BaseModel, replaced: Replacements, card: str
) -> dict[str, bytes | None]:
    """Return the files that stand beside the weights of a folded model in the place of the base model's.

    Args:
        name: The adapter's name, for warnings.
        companions: Files beside the adapter that belong to the model.
        base: The base model.
        replaced: Parameters that take the place of the base model's.
        card: The card of the folded model.

    Returns:
        Path to content; None for a file of the base model that is left out.
    """
    files: dict[str, bytes | None] = {CARD: card.encode(), CONFIG: None}
    if (base.directory / CARD).is_file():
        files[BASE_CARD] = companion(base.directory / CARD)
    if (base.directory / CONFIG).is_file():
        warnings.warn(
            f"{base.source} holds an adapter beside its weights ({CONFIG}), which transformers would apply when it "
            "loads that directory. It is not part of the folded model: merge it too, if it is wanted",
            stacklevel=4,
        )
    if (sizes := _sizes(base, replaced)) is not None:
        files |= _tokenizer(name, companions, base.directory, sizes)
    return files


def added_head(
    head: Replacements,
    base: BaseModel,
    task_type: str | None,
    auto_mapping: Mapping[str, Any] | None,
) -> NewHead:
    """Return a head that a folded model gets, though its base model has none; empty where that is not possible.

    Args:
        head: The parameters that the base model has no place for.
        base: The base model.
        task_type: PEFT's task type.
        auto_mapping: The model's class, as PEFT states it for an adapter without a task type.

    Raises:
        UnsupportedError: The base model is one file, and has no place for the head.
    """
    task = task_type or head.task.task_type
    mapped = (auto_mapping or {}).get("base_model_class") if task is None else None
    added = new_head(base, head, CLASSES_WITH_HEADS.get(str(task)) or mapped)
    if head.parameters and not added.parameters and base.directory.is_file():
        raise UnsupportedError(
            f"the adapter holds {', '.join(head.modules)}, for which a model in one file has no place: take it out of "
            "the LoRA, or fold into the directory of a pipeline, beside which it is kept"
        )
    return added


def warn_of_head_beside(name: str, head: Replacements, base: BaseModel) -> None:
    """Warn that a head is in a file beside the folded model.

    Args:
        name: The adapter's name.
        head: The parameters that the base model has no place for.
        base: The base model.
    """
    warnings.warn(
        f"{base.source} has no {', '.join(head.modules)}, and the folded model has none either: what {name} has "
        f"learnt of it is in {HEADS}/{name}.safetensors, and has to be put into the model when it is loaded; or "
        "fold into a base model that has one",
        stacklevel=4,
    )


def _sizes(base: BaseModel, replaced: Replacements) -> tuple[int, int] | None:
    """Return the number of tokens before the fold and after it; None if the vocabulary stays."""
    for parameter, new in replaced.parameters.items():
        module, _, kind = parameter.rpartition(".")
        old = base.shape(module) if kind == "weight" else ()
        if len(old) == 2 and old[1:] == new.shape[1:] and old != new.shape:
            return old[0], new.shape[0]
    return None


def _tokenizer(
    name: str, companions: Companions, base: Path, sizes: tuple[int, int]
) -> Mapping[str, bytes | None]:
    """Return the tokenizer beside the adapter, in the place of the base model's, which lacks the new tokens."""
    old = companions_beside(base)
    if TOKENIZER not in companions:
        if TOKENIZER in old:
            warnings.warn(
                f"the vocabulary changes from {sizes[0]} to {sizes[1]} tokens, and no tokenizer stands beside {name}: "
                "the folded model has the base model's tokenizer, which does not know them; copy the tokenizer that "
                "the adapter was trained with into the adapter's directory",
                stacklevel=6,
            )
        return {}
    files: dict[str, bytes | None] = {}
    for group in (TOKENIZER, TEMPLATE):
        files |= dict.fromkeys(old.get(group, {}) if group in companions else {})
        files |= {file: companion(path) for file, path in companions.get(group, {}).items()}
    return files
