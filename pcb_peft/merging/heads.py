"""Heads, embeddings and token rows that several adapters replace: what becomes of them, by a policy."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.deltas.replacements import (
    HeadPolicy,
    ReplacedParameter,
    Replacements,
    Task,
    TokenRows,
)
from pcb_peft.errors import MismatchError, OptionError, UnsupportedError
from pcb_peft.merging.untrained import beside_deltas, equal_up_to_rounding
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.recipes.weights import Weight, at_depth, number_of_layers

NO_HEAD = "the merged adapter itself has NONE"
"""Part of the note on heads that are kept apart."""


def notes_with_head(notes: Iterable[str], name: str, modules: Sequence[str]) -> tuple[str, ...]:
    """Return the notes of a merge that has got the head of one of its adapters.

    Args:
        notes: Those of the merge.
        name: The adapter whose head it is.
        modules: The modules of the head.
    """
    return (*notes_without_warning(notes), f"{', '.join(modules)}: that of {name}")


def notes_without_warning(notes: Iterable[str]) -> tuple[str, ...]:
    """Return the notes of a merge without the one on heads that are kept apart."""
    return tuple(note for note in notes if NO_HEAD not in note)


@dataclasses.dataclass(frozen=True, slots=True)
class MergedHeads:
    """The parameters that a merged adapter replaces.

    Attributes:
        head: Replaced by the result itself.
        kept: Replaced by each source for itself, in a file beside the result.
        notes: What was decided, for the report.
    """

    head: Replacements
    kept: dict[str, Replacements]
    notes: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class _HeadOwner:
    """One head, and whose it is.

    Attributes:
        name: The adapter's name, or that of the source whose head a merged adapter keeps.
        head: What it replaces.
        beside: The parameters among these that stand beside a delta: most often copies of the base model's.
        weight: From a parameter's path to the adapter's weight there; None for a head kept beside a merged adapter.
    """

    name: str
    head: Replacements
    beside: Collection[str]
    weight: Callable[[str], float] | None


def merge_heads(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    policy: HeadPolicy,
    *,
    chosen: str | None = None,
    compare: bool = True,
) -> MergedHeads:
    """Decide what the result replaces, and what is kept beside it for each adapter.

    What only one adapter replaces, or all by the same values, is part of the result. Parameters that PEFT saves
    together (a head's weight and bias) stay together; the rows of an embedding are decided one by one.

    Args:
        adapters: The adapters that are merged.
        weights: One per adapter.
        policy: "keep-each", "average", "first" or "refuse".
        chosen: The adapter whose head the result gets; the policy is then for what this adapter does not replace.
        compare: False if the values of several heads are not to be read: they then count as different.

    Raises:
        UnsupportedError: The policy refuses, or cannot be followed.
        MismatchError: Parameters of different shapes have no average.
        OptionError: The weights of the adapters that replace a parameter sum to 0.
    """
    owners = _head_owners(adapters, weights)
    if owners and policy == "refuse":
        raise UnsupportedError(
            f"{', '.join(owner.name for owner in owners)} replace parameters of the base model (modules_to_save, token "
            "rows) and heads='refuse'; heads='keep-each' keeps them in a file per adapter"
        )
    if chosen is not None:
        owners = _with_first(owners, chosen)
    merged = MergedHeads(Replacements(), {}, [])
    for group in _groups(owners):
        is_chosen = chosen is not None and bool(group & owners[0].head.parameters.keys())
        merged = _with_group(merged, owners, group, "first" if is_chosen else policy, compare)
    rows: dict[str, TokenRows] = {}
    for module in sorted({module for owner in owners for module in owner.head.rows}):
        holders = [owner for owner in owners if module in owner.head.rows]
        rows[module] = _rows(module, holders, policy, merged.notes)
    copies = {copy: of for owner in owners for copy, of in owner.head.copies.items()}
    return dataclasses.replace(
        merged, head=dataclasses.replace(merged.head, rows=rows, copies=copies)
    )


def _head_owners(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> list[_HeadOwner]:
    layers = number_of_layers(module for adapter in adapters for module in adapter.modules)
    owners: list[_HeadOwner] = []
    taken = {adapter.name for adapter in adapters}
    for index, adapter in enumerate(adapters):

        def weight(parameter: str, index: int = index) -> float:
            return at_depth(weights, parameter, layers)[index]

        owners.append(_HeadOwner(adapter.name, adapter.head, beside_deltas(adapter), weight))
        for source, head in adapter.heads.items():
            name = source
            while name in taken:
                name = f"{adapter.name}-{name}"
            taken.add(name)
            owners.append(_HeadOwner(name, head, (), None))
    return [owner for owner in owners if owner.head]


def _with_first(owners: Sequence[_HeadOwner], name: str) -> list[_HeadOwner]:
    """The owners, the one of this name first.

    Raises:
        OptionError: It has no head.
    """
    chosen = [owner for owner in owners if owner.name == name and owner.head.parameters]
    if not chosen:
        names = [owner.name for owner in owners if owner.head.parameters]
        known = f"those with a head are {', '.join(names)}" if names else "none of them has one"
        raise OptionError(
            f"head is {name!r}, and no adapter of that name has a head{did_you_mean(name, names)}; {known}"
        )
    return [*chosen, *(owner for owner in owners if owner not in chosen)]


def _groups(owners: Sequence[_HeadOwner]) -> list[set[str]]:
    """The parameters, those together that an adapter saves under one key of modules_to_save."""
    groups: list[set[str]] = []
    for owner in owners:
        for group in owner.head.groups().values():
            apart = [other for other in groups if not other & group]
            groups = [*apart, group.union(*(other for other in groups if other & group))]
    return groups


def _with_group(
    merged: MergedHeads,
    owners: Sequence[_HeadOwner],
    group: set[str],
    policy: HeadPolicy,
    compare: bool,
) -> MergedHeads:
    """The decisions so far, and that on one group of parameters."""
    holders = [owner for owner in owners if group & owner.head.parameters.keys()]
    heads = [owner.head.only(group) for owner in holders]
    keys = ", ".join(heads[0].modules)
    names = ", ".join(owner.name for owner in holders)
    if len(holders) == 1 or (compare and _identical(heads)):
        return dataclasses.replace(merged, head=merged.head.joined(heads[0]))
    copies = compare and all(group <= {*owner.beside} for owner in holders)
    if copies and (finest := _finest_copy(heads)) is not None:
        return dataclasses.replace(merged, head=merged.head.joined(finest))
    if policy == "keep-each":
        kept = {
            owner.name: merged.kept.get(owner.name, Replacements()).joined(head)
            for owner, head in zip(holders, heads, strict=True)
        }
        note = (
            f"{keys}: {names} have different ones, which are saved to heads/, and {NO_HEAD}: load one first, or PEFT "
            f"will make one up (load_merged(base_model, directory, head={holders[0].name!r}))"
        )
        return MergedHeads(merged.head, merged.kept | kept, [*merged.notes, note])
    head = heads[0] if policy == "first" else _average(holders, heads)
    how = f"that of {holders[0].name}" if policy == "first" else "the weighted average"
    note = f"{keys}: {how}, of {names}"
    return MergedHeads(merged.head.joined(head), merged.kept, [*merged.notes, note])


def _identical(heads: Sequence[Replacements]) -> bool:
    first, *others = heads
    return all(_shapes(other) == _shapes(first) for other in others) and all(
        torch.equal(values(), other.parameters[name]())
        for other in others
        for name, values in first.parameters.items()
    )


def _finest_copy(heads: Sequence[Replacements]) -> Replacements | None:
    """Return the head of which all others are copies, some of them rounded; None if there is none."""
    if any(_shapes(head) != _shapes(heads[0]) for head in heads):
        return None
    for head in heads:
        others = (other for other in heads if other is not head)
        if all(
            equal_up_to_rounding(values(), other.parameters[name]())
            for other in others
            for name, values in head.parameters.items()
        ):
            return head
    return None


def _shapes(head: Replacements) -> Mapping[str, tuple[int, ...]]:
    return {name: values.shape for name, values in head.parameters.items()}


def _average(holders: Sequence[_HeadOwner], heads: Sequence[Replacements]) -> Replacements:
    shapes = [_shapes(head) for head in heads]
    for owner, other in zip(holders, shapes, strict=True):
        if other != shapes[0]:
            raise MismatchError(
                f"heads='average': {holders[0].name} replaces {shapes[0]}, {owner.name} {other}; only parameters of "
                "the same names and shapes have an average: heads='keep-each' or 'first'"
            )
    parameters = {
        name: ReplacedParameter(
            shape,
            functools.partial(
                _mean, [head.parameters[name] for head in heads], _shares(holders, name)
            ),
        )
        for name, shape in shapes[0].items()
    }
    tasks = [head.task for head in heads]
    task = tasks[0] if all(other == tasks[0] for other in tasks) else Task()
    return Replacements(heads[0].modules, parameters, task=task)


def _mean(loads: Sequence[Callable[[], Tensor]], shares: Sequence[float]) -> Tensor:
    total = loads[0]().double() * shares[0]
    for load, share in zip(loads[1:], shares[1:], strict=True):
        total.add_(load(), alpha=share)
    return total.float()


def _shares(holders: Sequence[_HeadOwner], parameter: str) -> list[float]:
    """The weights of the owners of a parameter, divided by their sum."""
    weights: list[float] = []
    for owner in holders:
        if owner.weight is None:
            raise UnsupportedError(
                f"heads='average': the head of {owner.name} is kept beside a merged adapter and has no weight of its "
                "own; merge the original adapters, or take heads='keep-each' or 'first'"
            )
        weights.append(owner.weight(parameter))
    total = math.fsum(weights)
    if abs(total) <= 1e-12 * math.fsum(map(abs, weights)):
        raise OptionError(
            f"heads='average': the weights of {', '.join(owner.name for owner in holders)}, which replace {parameter}, "
            "sum to 0, and there is no average; take other weights, or heads='keep-each' or 'first'"
        )
    return [weight / total for weight in weights]


def _rows(
    module: str, holders: Sequence[_HeadOwner], policy: HeadPolicy, notes: list[str]
) -> TokenRows:
    """The union of all rows of a module's weight; rows that had to be decided are noted."""
    values = [owner.head.rows[module].load() for owner in holders]
    widths = {owner.name: tensor.shape[1] for owner, tensor in zip(holders, values, strict=True)}
    if len(set(widths.values())) > 1:
        raise MismatchError(
            f"{module}: the rows that the adapters replace are as wide as {widths}; only adapters of one base model "
            "can be merged"
        )
    by_index: dict[int, list[tuple[_HeadOwner, Tensor]]] = {}
    for owner, tensor in zip(holders, values, strict=True):
        for index, row in zip(owner.head.rows[module].indices, tensor, strict=True):
            by_index.setdefault(index, []).append((owner, row))
    indices = tuple(sorted(by_index))
    merged = torch.stack([_row(module, index, by_index[index], policy) for index in indices])
    disputed = [
        index
        for index, (first, *others) in sorted(by_index.items())
        if any(not torch.equal(row, first[1]) for _, row in others)
    ]
    if disputed:
        how = "the first" if policy == "first" else "the weighted average"
        notes.append(f"{module}: {how}, of rows {', '.join(map(str, disputed))}")
    return TokenRows(indices, functools.partial(_given, merged))


def _given(rows: Tensor) -> Tensor:
    return rows


def _row(
    module: str, index: int, owned: Sequence[tuple[_HeadOwner, Tensor]], policy: HeadPolicy
) -> Tensor:
    owners, rows = zip(*owned, strict=True)
    if policy == "first" or all(torch.equal(row, rows[0]) for row in rows):
        return rows[0]
    if policy == "average":
        return _mean([lambda row=row: row for row in rows], _shares(owners, f"{module}.weight"))
    raise UnsupportedError(
        f"{module}: {', '.join(owner.name for owner in owners)} replace row {index} (a token's embedding) by different "
        "values, and an adapter has one for each: heads='average' or 'first', or train them on different tokens"
    )
