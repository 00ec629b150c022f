"""What becomes of the parameters that several adapters replace: a policy, by name."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.deltas.replacements import Head, Parameter, Rows
from pcb_peft.errors import MismatchError, OptionError, UnsupportedError
from pcb_peft.recipes.overrides import Weight, at_depth, layer_of


@dataclasses.dataclass(frozen=True, slots=True)
class Settled:
    """What is replaced in the end.

    Attributes:
        head: By the result itself.
        kept: By each source, for itself.
        notes: What was decided, for the report.
    """

    head: Head
    kept: dict[str, Head]
    notes: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class _Voice:
    """One head, and whose it is.

    Attributes:
        name: Of the adapter, or of the one whose head a merged adapter keeps.
        head: What it replaces.
        weight: By parameter path; None for a head that is kept beside a merged adapter.
    """

    name: str
    head: Head
    weight: Callable[[str], float] | None


def settle(adapters: Sequence[Adapter], weights: Sequence[Weight], policy: str) -> Settled:
    """What the result replaces, and what is kept beside it, by adapter.

    What only one adapter replaces, or all in the same way, to the bit, is part of the result. Parameters that PEFT
    saves together (a head's weight and bias) stay together; the rows of an embedding are settled one by one.

    Args:
        adapters: Those that are merged.
        weights: One per adapter.
        policy: "keep-each", "average", "first" or "refuse".

    Raises:
        UnsupportedError: The policy refuses, or cannot be followed.
        MismatchError: Parameters of different shapes have no average.
        OptionError: The weights of those who hold a parameter sum to 0.
    """
    voices = _voices(adapters, weights)
    if voices and policy == "refuse":
        raise UnsupportedError(
            f"{', '.join(voice.name for voice in voices)} replace parameters of the base model (modules_to_save, token "
            "rows) and heads='refuse'; heads='keep-each' keeps them in a file per adapter"
        )
    settled = Settled(Head(), {}, [])
    for group in _groups(voices):
        settled = _with_group(settled, voices, group, policy)
    rows: dict[str, Rows] = {}
    for module in sorted({module for voice in voices for module in voice.head.rows}):
        holders = [voice for voice in voices if module in voice.head.rows]
        rows[module] = _rows(module, holders, policy, settled.notes)
    copies = {copy: of for voice in voices for copy, of in voice.head.copies.items()}
    return dataclasses.replace(
        settled, head=dataclasses.replace(settled.head, rows=rows, copies=copies)
    )


def _voices(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> list[_Voice]:
    layers = 1 + max((layer_of(m) or 0 for adapter in adapters for m in adapter.modules), default=0)
    voices: list[_Voice] = []
    taken = {adapter.name for adapter in adapters}
    for index, adapter in enumerate(adapters):

        def weight(parameter: str, index: int = index) -> float:
            return at_depth(weights, parameter, layers)[index]

        voices.append(_Voice(adapter.name, adapter.head, weight))
        for part, head in adapter.heads.items():
            name = part
            while name in taken:
                name = f"{adapter.name}-{name}"
            taken.add(name)
            voices.append(_Voice(name, head, None))
    return [voice for voice in voices if voice.head]


def _groups(voices: Sequence[_Voice]) -> list[set[str]]:
    """The parameters, those together that an adapter saves under one word."""
    groups: list[set[str]] = []
    for voice in voices:
        for group in voice.head.groups().values():
            apart = [other for other in groups if not other & group]
            groups = [*apart, group.union(*(other for other in groups if other & group))]
    return groups


def _with_group(
    settled: Settled, voices: Sequence[_Voice], group: set[str], policy: str
) -> Settled:
    """What was settled before, and these parameters."""
    holders = [v for v in voices if group & v.head.parameters.keys()]
    heads = [voice.head.only(group) for voice in holders]
    words = ", ".join(heads[0].modules)
    names = ", ".join(voice.name for voice in holders)
    if len(holders) == 1 or _identical(heads):
        return dataclasses.replace(settled, head=_joined(settled.head, heads[0]))
    if policy == "keep-each":
        kept = {
            voice.name: _joined(settled.kept.get(voice.name, Head()), head)
            for voice, head in zip(holders, heads, strict=True)
        }
        note = f"{words}: {names} keep their own"
        return Settled(settled.head, settled.kept | kept, [*settled.notes, note])
    head = heads[0] if policy == "first" else _average(holders, heads)
    how = f"that of {holders[0].name}" if policy == "first" else "the weighted average"
    note = f"{words}: {how}, of {names}"
    return Settled(_joined(settled.head, head), settled.kept, [*settled.notes, note])


def _joined(one: Head, other: Head) -> Head:
    words = tuple(dict.fromkeys([*one.modules, *other.modules]))
    return Head(words, {**one.parameters, **other.parameters})


def _identical(heads: Sequence[Head]) -> bool:
    first, *others = heads
    return all(_shapes(other) == _shapes(first) for other in others) and all(
        torch.equal(values(), other.parameters[name]())
        for other in others
        for name, values in first.parameters.items()
    )


def _shapes(head: Head) -> Mapping[str, tuple[int, ...]]:
    return {name: values.shape for name, values in head.parameters.items()}


def _average(holders: Sequence[_Voice], heads: Sequence[Head]) -> Head:
    shapes = [_shapes(head) for head in heads]
    for voice, other in zip(holders, shapes, strict=True):
        if other != shapes[0]:
            raise MismatchError(
                f"heads='average': {holders[0].name} replaces {shapes[0]}, {voice.name} {other}; only parameters of "
                "the same names and shapes have an average: heads='keep-each' or 'first'"
            )
    parameters = {
        name: Parameter(
            shape,
            functools.partial(
                _mean, [head.parameters[name] for head in heads], _shares(holders, name)
            ),
        )
        for name, shape in shapes[0].items()
    }
    return Head(heads[0].modules, parameters)


def _mean(loads: Sequence[Callable[[], Tensor]], shares: Sequence[float]) -> Tensor:
    total = loads[0]().double() * shares[0]
    for load, share in zip(loads[1:], shares[1:], strict=True):
        total.add_(load(), alpha=share)
    return total.float()


def _shares(holders: Sequence[_Voice], parameter: str) -> list[float]:
    """The weights of those who hold a parameter, divided by their sum."""
    weights: list[float] = []
    for voice in holders:
        if voice.weight is None:
            raise UnsupportedError(
                f"heads='average': the head of {voice.name} is kept beside a merged adapter and has no weight of its "
                "own; merge the original adapters, or take heads='keep-each' or 'first'"
            )
        weights.append(voice.weight(parameter))
    total = math.fsum(weights)
    if abs(total) <= 1e-12 * math.fsum(map(abs, weights)):
        raise OptionError(
            f"heads='average': the weights of {', '.join(voice.name for voice in holders)}, which replace {parameter}, "
            "sum to 0, and there is no average; take other weights, or heads='keep-each' or 'first'"
        )
    return [weight / total for weight in weights]


def _rows(module: str, holders: Sequence[_Voice], policy: str, notes: list[str]) -> Rows:
    """The union of all rows of a module's weight; notes which of them had to be decided."""
    values = [voice.head.rows[module].load() for voice in holders]
    widths = {voice.name: tensor.shape[1] for voice, tensor in zip(holders, values, strict=True)}
    if len(set(widths.values())) > 1:
        raise MismatchError(
            f"{module}: the rows that the adapters replace are as wide as {widths}; only adapters of one base model "
            "can be merged"
        )
    found: dict[int, list[tuple[_Voice, Tensor]]] = {}
    for voice, tensor in zip(holders, values, strict=True):
        for index, row in zip(voice.head.rows[module].indices, tensor, strict=True):
            found.setdefault(index, []).append((voice, row))
    indices = tuple(sorted(found))
    merged = torch.stack([_row(module, index, found[index], policy) for index in indices])
    disputed = [i for i in indices if any(not torch.equal(r, found[i][0][1]) for _, r in found[i])]
    if disputed:
        how = "the first" if policy == "first" else "the weighted average"
        notes.append(f"{module}: {how}, of rows {', '.join(map(str, disputed))}")
    return Rows(indices, lambda: merged)


def _row(module: str, index: int, held: Sequence[tuple[_Voice, Tensor]], policy: str) -> Tensor:
    voices, rows = zip(*held, strict=True)
    if policy == "first" or all(torch.equal(row, rows[0]) for row in rows):
        return rows[0]
    if policy == "average":
        return _mean([lambda row=row: row for row in rows], _shares(voices, f"{module}.weight"))
    raise UnsupportedError(
        f"{module}: {', '.join(voice.name for voice in voices)} replace row {index} (a token's embedding) by different "
        "values, and an adapter has one for each: heads='average' or 'first', or train them on different tokens"
    )
