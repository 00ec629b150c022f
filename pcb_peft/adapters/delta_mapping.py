"""The deltas of an adapter, by module."""

from collections.abc import Iterator, Mapping

from pcb_peft.deltas.delta import Delta
from pcb_peft.errors import MismatchError
from pcb_peft.formats import LazyDelta
from pcb_peft.plugins.options import did_you_mean


class DeltaMapping(Mapping[str, Delta]):
    """Module path to delta; a delta is read, or computed, each time it is asked for, and not kept.

    Attributes:
        entries: Module path to the delta before it is read, in the order of paths.
    """

    def __init__(self, entries: Mapping[str, LazyDelta]) -> None:
        self.entries = dict(sorted(entries.items()))

    def __getitem__(self, module: str) -> Delta:
        if module not in self.entries:
            raise KeyError(f"no delta for {module!r}{did_you_mean(module, self.entries)}")
        return self.entries[module].load()

    def __contains__(self, module: object) -> bool:
        return module in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def renamed(self, names: Mapping[str, str], owner: str) -> "DeltaMapping":
        """Return the same deltas with other names for some modules.

        Args:
            names: Present name of a module to its new one.
            owner: Name of the adapter, for messages.

        Raises:
            MismatchError: Two modules would have one name.
        """
        entries: dict[str, LazyDelta] = {}
        for module, entry in self.entries.items():
            new = names.get(module, module)
            if new in entries:
                raise MismatchError(
                    f"{owner}: {module} and another module are both {new} in the base model: they are one weight, and "
                    "which change is meant is not known; leave one of them out of the adapter"
                )
            entries[new] = entry
        return DeltaMapping(entries)
