"""Names of adapters, by which reports, heads and data know them."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

from pcb_peft.adapters.adapter import Adapter


def named_apart(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the same adapters, numbered where two have the same name: a, a → a-1, a-2."""
    total = Counter(adapter.name for adapter in adapters)
    taken = {name for name, count in total.items() if count == 1}
    named: list[Adapter] = []
    for adapter in adapters:
        numbered = (f"{adapter.name}-{number}" for number in itertools.count(1))
        unique = total[adapter.name] == 1
        name = adapter.name if unique else next(n for n in numbered if n not in taken)
        taken.add(name)
        named.append(dataclasses.replace(adapter, name=name))
    return named
