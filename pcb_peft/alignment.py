"""Do adapters fit each other? Checked before a tensor is read."""

import copy
from collections.abc import Iterable, Mapping, Sequence

from pcb_peft.adapter import Adapter
from pcb_peft.delta import Delta, Diagonal, Rescaled
from pcb_peft.errors import MismatchError
from pcb_peft.formats import Entry


class Alignment:
    """Adapters side by side: for every module that one of them touches, the delta of each.

    Attributes:
        adapters: In the caller's order.
        modules: Module path to the first entry there is for it, which stands for its kind and shape.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """Raises MismatchError where two adapters hold different kinds or shapes for a module."""
        self.adapters = adapters
        self.modules: dict[str, Entry] = {}
        owners: dict[str, Adapter] = {}
        for adapter in adapters:
            for module, entry in adapter.modules.entries.items():
                first = self.modules.setdefault(module, entry)
                _check_pair(module, (owners.setdefault(module, adapter), first), (adapter, entry))
        self.modules = dict(sorted(self.modules.items()))

    @property
    def kinds(self) -> set[type[Delta]]:
        return {
            entry.kind for adapter in self.adapters for entry in adapter.modules.entries.values()
        }

    def only(self, modules: Iterable[str]) -> "Alignment":
        """The same adapters, on those of the modules that they touch."""
        some = copy.copy(self)
        some.modules = {m: self.modules[m] for m in modules if m in self.modules}
        return some

    def deltas(self, module: str) -> list[Delta]:
        """One per adapter; a zero for those that do not touch the module."""
        present = {i: a.modules[module] for i, a in enumerate(self.adapters) if module in a.modules}
        template = next(iter(present.values()))
        return [present.get(i, template.zero()) for i in range(len(self.adapters))]

    def total_rank(self, module: str, *, in_parts: bool = False) -> int:
        """R = Σ r_t over the adapters that touch the module; a dense delta counts in full.

        So does one that has a low-rank part, unless it is taken `in_parts`.
        """
        entries = [a.modules.entries[module] for a in self.adapters if module in a.modules]
        whole = () if in_parts else (Rescaled,)
        return sum(min(e.shape) if e.rank is None or e.kind in whole else e.rank for e in entries)


def _check_pair(module: str, one: tuple[Adapter, Entry], other: tuple[Adapter, Entry]) -> None:
    (first, first_entry), (second, second_entry) = one, other
    one_multiplies = (first_entry.kind is Diagonal) != (second_entry.kind is Diagonal)
    if one_multiplies or first_entry.shape != second_entry.shape:
        raise MismatchError(
            f"{module}: {first.name} holds a {first_entry.kind.__name__} of shape {first_entry.shape}, "
            f"{second.name} a {second_entry.kind.__name__} of shape {second_entry.shape}; "
            "only adapters of one base model and of one kind can be merged"
        )


def common_base(adapters: Sequence[Adapter], stated: str | None) -> tuple[str | None, str | None]:
    """The base model, and its revision, of all adapters.

    A directory and a hub id that end in the same name count as the same model. What the caller states is not compared.

    Raises:
        MismatchError: They name different ones.
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
        return stated, None
    hub = next((a for a in named if not str(a.base_model).startswith(("/", "."))), named[0])
    revisions = {adapter.revision for adapter in named}
    return hub.base_model, revisions.pop() if len(revisions) == 1 else None


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1].lower()
