"""The two ends of a model when it changes: weights that are tied, and a vocabulary of another size."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pcb_peft.base.architecture import build_skeleton
from pcb_peft.base.model import BaseModel, tied_error
from pcb_peft.errors import BaseModelError, MismatchError
from pcb_peft.writing.shards import CheckpointEdit, TensorEdit

CLOSE = 1e-5  # two changes of tied weights that differ by less, relative to the larger, are one


@dataclasses.dataclass(frozen=True, slots=True)
class ParameterChange:
    """What becomes of a parameter in memory.

    Attributes:
        parameter: The one in the files that holds its values, its own or another that it is tied to.
        edit: From the base's values.
        shape: In the end.
        own: False for what changes only because it is tied to another.
    """

    parameter: str
    edit: TensorEdit
    shape: tuple[int, ...]
    own: bool = True


def resolve_tied_edits(
    changes: Mapping[str, ParameterChange], base: BaseModel, policy: str
) -> CheckpointEdit:
    """What becomes of the tensors in the files; what is tied is changed once.

    Args:
        changes: By name in memory.
        base: The base model.
        policy: What becomes of tied weights when the change of one end is not that of the other: "refuse"; "untie", and
            each end has its own weights from then on; "both" ends change like the one for which there is a change.

    Raises:
        BaseModelError: It is refused, or not possible.
    """
    rewrite = CheckpointEdit({}, {}, {})
    settled: set[str] = set()
    for name, change in changes.items():
        ends = tuple(sorted({name, *base.tied(name)}))
        if len(ends) == 1:
            _put(rewrite, base, change.parameter, change)
        elif name not in settled:
            settled.update(ends)
            _resolve_tied(rewrite, {end: changes.get(end) for end in ends}, base, policy)
    return rewrite


def _resolve_tied(
    rewrite: CheckpointEdit,
    ends: Mapping[str, ParameterChange | None],
    base: BaseModel,
    policy: str,
) -> None:
    """Tied weights."""
    given = {end: change for end, change in ends.items() if change is not None}
    own = {end: change for end, change in given.items() if change.own}
    name, change = next(iter(own.items()))
    meant = own if policy == "both" else given
    agree = all(_same(change, other, base) for other in meant.values())
    if agree and (len(given) == len(ends) or policy == "both"):
        stored = {base.find(end) for end in ends} - {None}
        for parameter in stored:
            _put(rewrite, base, str(parameter), change)
    elif policy == "untie" and len(ends) == 2 and all(map(base.has, ends)):
        old = ParameterChange(
            change.parameter, lambda values: values, base.spans[change.parameter].shape
        )
        for end, new in ends.items():
            _put(rewrite, base, base.find(end) or end, new or old)
    else:
        others = tuple(end for end in ends if end != name)
        if policy != "untie":
            raise tied_error(base.source, name.removesuffix(".weight"), others)
        raise BaseModelError(
            f"{base.source}: {name} is tied to {', '.join(others)} and cannot be untied: that is possible for two ends "
            "whose names transformers knows; tied='both' changes all of them, or leave the module out"
        )


def _put(rewrite: CheckpointEdit, base: BaseModel, parameter: str, change: ParameterChange) -> None:
    rewrite.edits[parameter] = change.edit
    if parameter not in base.spans:
        rewrite.added[parameter] = change.parameter
    if change.shape != rewrite.shape(base, parameter):
        rewrite.shapes[parameter] = change.shape


def _same(one: ParameterChange, other: ParameterChange, base: BaseModel) -> bool:
    """Whether two changes of one weight are the same, but for rounding."""
    if one is other or one.shape != other.shape:
        return one is other
    weight = base.tensor(one.parameter).float()
    first, second = one.edit(weight.clone()), other.edit(weight)
    reach = max(float(torch.linalg.vector_norm(values)) for values in (first, second))
    return float(torch.linalg.vector_norm(first - second)) <= CLOSE * reach


def check_untied(directory: Path, ends: Sequence[str]) -> None:
    """Raises BaseModelError where transformers would tie weights of a written model all the same."""
    skeleton = build_skeleton(directory)
    for end in ends:
        if tied := skeleton.tied.get(skeleton.known(end) or end):
            raise BaseModelError(
                f"{end} is tied to {', '.join(tied)} by the architecture, whatever tie_word_embeddings says: it cannot "
                "be untied; fold with tied='both', or leave the module out"
            )


def vocab_resizes(rewrite: CheckpointEdit, base: BaseModel) -> dict[int, int]:
    """The size of the vocabulary before and after, where it changes.

    Raises:
        MismatchError: A parameter changes its shape that is no embedding, or one end does and the other does not.
    """
    sizes: dict[int, int] = {}
    embeddings = base.embeddings
    for name, shape in rewrite.shapes.items():
        source = rewrite.added.get(name, name)
        old = base.spans[source].shape
        if (name not in embeddings and source not in embeddings) or shape[1:] != old[1:]:
            raise _misfit(name, shape, old, "")
        sizes[old[0]] = shape[0]
        for other in [*embeddings, *rewrite.added]:
            then = rewrite.shape(base, other)
            before = base.spans[rewrite.added.get(other, other)].shape
            if before[:1] == old[:1] and then[:1] != shape[:1]:
                raise _misfit(name, shape, old, f", and {other} would have {then[0]} rows")
    return sizes


def _misfit(name: str, shape: tuple[int, ...], old: tuple[int, ...], more: str) -> MismatchError:
    return MismatchError(
        f"{name}: the adapter replaces it by {shape}, the base has {old}{more}; give the base that the adapter was "
        "trained on, with its vocabulary"
    )
