"""Embeddings and output layer in a fold: weights that are tied, and a vocabulary of another size."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pcb_peft.base.model import BaseModel, open_base_model
from pcb_peft.base.refusals import tied_error
from pcb_peft.errors import BaseModelError, MismatchError
from pcb_peft.writing.edits import TensorEdit, Unchanged
from pcb_peft.writing.shards import CheckpointEdit

SAME_CHANGE = 1e-5
"""Changes of tied weights that differ by less, relative to the larger, count as one."""


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterChange:
    """The change of a parameter in memory.

    Attributes:
        parameter: Name in the files of its values; those of another parameter, if it is tied to that one.
        edit: Edit of the base model's values.
        shape: Shape after the edit.
        asked_for: False for a parameter that changes only because it is tied to another one.
    """

    parameter: str
    edit: TensorEdit
    shape: tuple[int, ...]
    asked_for: bool = True


def resolve_tied_edits(
    changes: Mapping[str, ParameterChange], base: BaseModel, policy: str
) -> CheckpointEdit:
    """Return the edits of the tensors in the files; tied weights are changed once.

    Args:
        changes: Changes by name in memory.
        base: The base model.
        policy: Policy for tied weights whose two ends do not change alike: "refuse"; "untie": each end has its own
            weights from then on; "both": both ends change like the one that has a change.

    Raises:
        BaseModelError: The policy refuses it, or it is not possible.
    """
    checkpoint = CheckpointEdit({}, {}, {})
    done: set[str] = set()
    for name, change in changes.items():
        ends = tuple(sorted({name, *base.names.tied(name)}))
        if len(ends) == 1:
            _put(checkpoint, base, change.parameter, change)
        elif name not in done:
            done.update(ends)
            _resolve_tied(checkpoint, {end: changes.get(end) for end in ends}, base, policy)
    return checkpoint


def _resolve_tied(
    checkpoint: CheckpointEdit,
    ends: Mapping[str, ParameterChange | None],
    base: BaseModel,
    policy: str,
) -> None:
    """Put the edits of tied weights into a checkpoint; the arguments are those of `resolve_tied_edits`."""
    given = {end: change for end, change in ends.items() if change is not None}
    asked_for = {end: change for end, change in given.items() if change.asked_for}
    name, change = next(iter(asked_for.items()))
    must_agree = asked_for if policy == "both" else given
    agree = all(_same(change, other, base) for other in must_agree.values())
    if agree and (len(given) == len(ends) or policy == "both"):
        stored = {base.names.in_files(end) for end in ends} - {None}
        for parameter in stored:
            _put(checkpoint, base, str(parameter), change)
    elif policy == "untie" and len(ends) == 2 and all(map(base.names.has, ends)):
        old = ParameterChange(change.parameter, Unchanged(), base.tensors[change.parameter].shape)
        for end, new in ends.items():
            _put(checkpoint, base, base.names.in_files(end) or end, new or old)
    else:
        others = tuple(end for end in ends if end != name)
        if policy != "untie":
            raise tied_error(base.source, name.removesuffix(".weight"), others)
        raise BaseModelError(
            f"{base.source}: {name} is tied to {', '.join(others)} and cannot be untied: that is possible for two ends "
            "whose names transformers knows; tied='both' changes all of them, or leave the module out"
        )


def _put(
    checkpoint: CheckpointEdit, base: BaseModel, parameter: str, change: ParameterChange
) -> None:
    checkpoint.edits[parameter] = change.edit
    if parameter not in base.tensors:
        checkpoint.added[parameter] = change.parameter
    if change.shape != checkpoint.shape(base, parameter):
        checkpoint.shapes[parameter] = change.shape


def _same(one: ParameterChange, other: ParameterChange, base: BaseModel) -> bool:
    """Return whether two changes of one weight are the same, but for rounding."""
    if one is other or one.shape != other.shape:
        return one is other
    weight = base.tensor(one.parameter).float()
    first, second = one.edit.apply(weight.clone()), other.edit.apply(weight)
    larger = max(float(torch.linalg.vector_norm(values)) for values in (first, second))
    return float(torch.linalg.vector_norm(first - second)) <= SAME_CHANGE * larger


def check_untied(directory: Path, ends: Sequence[str]) -> None:
    """Raise BaseModelError where transformers would tie weights of a written model all the same."""
    names = open_base_model(directory).names
    for end in ends:
        if tied := names.tied(end):
            raise BaseModelError(
                f"{end} is tied to {', '.join(tied)} by the architecture, whatever tie_word_embeddings says: it cannot "
                "be untied; fold with tied='both', or leave the module out"
            )


def vocab_resizes(checkpoint: CheckpointEdit, base: BaseModel) -> dict[int, int]:
    """Return the size of the vocabulary before the fold to its size after it; empty if it stays.

    Raises:
        MismatchError: A parameter that is not an embedding changes its shape, or only one of the two ends does.
    """
    sizes: dict[int, int] = {}
    embeddings = base.names.embeddings
    for name, shape in checkpoint.shapes.items():
        source = checkpoint.added.get(name, name)
        old = base.tensors[source].shape
        if name not in embeddings and source not in embeddings:
            raise MismatchError(
                f"{name}: the adapter replaces it by {shape}, the base has {old}; give the base that the adapter was "
                "trained on; if this is a head for other classes, load that base with as many classes (num_labels=…), "
                "save it, and fold into what you saved"
            )
        if shape[1:] != old[1:]:
            raise _misfit(name, shape, old, "")
        sizes[old[0]] = shape[0]
        for other in [*embeddings, *checkpoint.added]:
            then = checkpoint.shape(base, other)
            before = base.tensors[checkpoint.added.get(other, other)].shape
            if before[:1] == old[:1] and then[:1] != shape[:1]:
                raise _misfit(name, shape, old, f", and {other} would have {then[0]} rows")
    return sizes


def _misfit(name: str, shape: tuple[int, ...], old: tuple[int, ...], more: str) -> MismatchError:
    return MismatchError(
        f"{name}: the adapter replaces it by {shape}, the base has {old}{more}; give the base that the adapter was "
        "trained on, with its vocabulary"
    )
