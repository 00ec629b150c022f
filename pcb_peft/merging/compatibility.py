"""Adapters side by side, and the checks that they fit each other: made before a tensor is read."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.deltas.delta import Delta
from pcb_peft.errors import MismatchError
from pcb_peft.formats import LazyDelta
from pcb_peft.runtime.processes import union

ONE_KIND = "only adapters of one base model and of one kind can be merged"
ONE_SIDE = (
    "an (IA)³ scales the input of its feedforward_modules and the output of others: all must scale the same side; or "
    "give the base model and space='dense' (--base-model … --space dense), and they are merged as changes of W"
)


class AdapterSet:
    """Several adapters: for every module that one of them touches, the delta of each.

    Attributes:
        adapters: The adapters, in the caller's order.
        modules: Module path to the entry of the first adapter that touches it, which stands for its kind and shape.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """Raises MismatchError where two adapters hold different kinds or shapes for a module."""
        self.adapters = adapters
        self.modules: dict[str, LazyDelta] = {}
        owners: dict[str, Adapter] = {}
        for adapter in adapters:
            for module, entry in adapter.modules.entries.items():
                first = self.modules.setdefault(module, entry)
                _check_pair(module, (owners.setdefault(module, adapter), first), (adapter, entry))
                if entry.parameter:  # of a router under two names, this one is right for PEFT
                    self.modules[module] = dataclasses.replace(first, parameter=True)
        self.modules = dict(sorted(self.modules.items()))

    @property
    def kinds(self) -> set[type[Delta]]:
        """The kinds of all deltas."""
        return {
            entry.kind for adapter in self.adapters for entry in adapter.modules.entries.values()
        }

    @property
    def has_full_rank(self) -> bool:
        """True if a delta is a matrix of full rank: that of a full fine-tune, or of a DoRA, which rescales W."""
        return any(
            entry.kind.rescales or (entry.rank is None and not entry.kind.multiplies)
            for adapter in self.adapters
            for entry in adapter.modules.entries.values()
        )

    @property
    def has_only_vectors(self) -> bool:
        """True if all deltas are (IA)³ vectors."""
        return all(
            entry.kind.multiplies and not entry.kind.rescales
            for adapter in self.adapters
            for entry in adapter.modules.entries.values()
        )

    def only(self, modules: Iterable[str]) -> "AdapterSet":
        """Return the same adapters, limited to some modules."""
        limited = copy.copy(self)
        limited.modules = {m: self.modules[m] for m in modules if m in self.modules}
        return limited

    def deltas(self, module: str) -> list[Delta]:
        """Load one delta per adapter; a zero for an adapter that does not touch the module."""
        present = {i: a.modules[module] for i, a in enumerate(self.adapters) if module in a.modules}
        template = next(iter(present.values()))
        return [present.get(i, template.zero()) for i in range(len(self.adapters))]

    def present(self, module: str) -> dict[str, Delta]:
        """Load the deltas of the adapters that touch the module, by the adapter's name."""
        return {a.name: a.modules[module] for a in self.adapters if module in a.modules}

    def lossless_size(self, *, in_parts: bool = False) -> tuple[int, int]:
        """Return the rank of a merge without loss, and the number of values in its factors; `in_parts` as below."""
        shapes = {module: entry.shape for module, entry in self.modules.items()}
        rank = max(
            min(self.total_rank(m, in_parts=in_parts), *shape) for m, shape in shapes.items()
        )
        return rank, rank * sum(map(sum, shapes.values()))

    def total_rank(self, module: str, *, in_parts: bool = False) -> int:
        """Return R = Σ r_t over the adapters that touch the module.

        A dense delta counts with its full rank; so does a DoRA's, unless its low-rank part is taken by itself
        (`in_parts`).
        """
        entries = [a.modules.entries[module] for a in self.adapters if module in a.modules]
        full = [e.rank is None or (e.kind.rescales and not in_parts) for e in entries]
        return sum(
            min(e.shape) if is_full else e.rank or 0
            for e, is_full in zip(entries, full, strict=True)
        )


def _check_pair(
    module: str, one: tuple[Adapter, LazyDelta], other: tuple[Adapter, LazyDelta]
) -> None:
    (first, first_entry), (second, second_entry) = one, other
    multiply = first_entry.kind.multiplies, second_entry.kind.multiplies
    if multiply[0] != multiply[1] or first_entry.shape != second_entry.shape:
        sides = {entry.shape[0] == 1 for entry in (first_entry, second_entry)}
        two_sides = all(multiply) and len(sides) > 1
        raise MismatchError(
            f"{module}: {first.name} has a delta of shape {first_entry.shape} ({first_entry.kind.kind_name}), "
            f"{second.name} one of shape {second_entry.shape} ({second_entry.kind.kind_name}); "
            + (ONE_SIDE if two_sides else ONE_KIND + _different_bases(first, second))
        )


def _different_bases(first: Adapter, second: Adapter) -> str:
    """Say which base models two adapters name, if they name two."""
    if not (first.base_model and second.base_model) or first.base_model == second.base_model:
        return ""
    return f": {first.name} was trained on {first.base_model}, {second.name} on {second.base_model}"


class CommonBase(NamedTuple):
    """The base model of several adapters.

    Attributes:
        name: Path or hub id, as far as it is known.
        revision: Its revision, if all adapters name the same.
        notes: Names that were taken for one model, for the report.
    """

    name: str | None
    revision: str | None
    notes: Sequence[str] = ()


def common_base(adapters: Sequence[Adapter], stated: str | None) -> CommonBase:
    """Find the base model of all adapters.

    Names that end alike count as one model: a directory and a hub id, or copies in several places. A base model that
    the caller states is not compared.

    Raises:
        MismatchError: The adapters name different ones.
    """
    named = [adapter for adapter in adapters if adapter.base_model]
    bases: Mapping[str, Adapter] = {
        _last(str(adapter.base_model)): adapter for adapter in reversed(named)
    }
    if stated is None and len(bases) > 1:
        raise MismatchError(
            "the adapters have different base models: "
            + ", ".join(f"{adapter.name} has {adapter.base_model}" for adapter in named)
            + "; if they are the same model under several names, state it: base_model=…, --base-model …"
        )
    if stated is not None or not named:
        return CommonBase(stated, None, _class_notes(adapters))
    hub = next((a for a in named if not str(a.base_model).startswith(("/", "."))), named[0])
    revisions = {adapter.revision for adapter in named}
    revision = revisions.pop() if len(revisions) == 1 else None
    notes = _class_notes(adapters)
    if len(spellings := {str(adapter.base_model) for adapter in named}) > 1:
        notes.append(
            f"{', '.join(sorted(spellings))} are taken for one base model: the names end alike"
        )
    if revisions:
        listed = ", ".join(sorted(str(revision) for revision in revisions))
        notes.append(f"the base model's revision is left open: the adapters name {listed}")
    return CommonBase(hub.base_model, revision, notes)


def common_mapping(adapters: Sequence[Adapter]) -> Mapping[str, Any] | None:
    """Return the class of the model (PEFT's auto_mapping), if the adapters that state one agree; else None."""
    stated = [adapter.auto_mapping for adapter in adapters if adapter.auto_mapping]
    return stated[0] if len(_classes(adapters)) == 1 else None


def common_task(adapters: Sequence[Adapter]) -> str | None:
    """Return PEFT's task type, if the adapters agree on one; else None."""
    tasks = {adapter.task_type for adapter in adapters}
    return tasks.pop() if len(tasks) == 1 else None


def licences_of(adapters: Sequence[Adapter]) -> dict[str, Mapping[str, Any]]:
    """Return the licences of what was merged: name of an adapter to what its card states."""
    return union(adapter.licences for adapter in adapters)


def _class_notes(adapters: Sequence[Adapter]) -> list[str]:
    """Return a note where adapters were trained on different classes of the base model."""
    classes = _classes(adapters)
    if len(classes) < 2:
        return []
    return [
        f"the adapters were trained on {', '.join(classes)}: the merged adapter names no class (auto_mapping)"
    ]


def _classes(adapters: Sequence[Adapter]) -> list[str]:
    mappings = [adapter.auto_mapping for adapter in adapters if adapter.auto_mapping]
    return sorted({str(mapping.get("base_model_class")) for mapping in mappings})


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1].lower()
