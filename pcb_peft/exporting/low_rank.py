"""An adapter as plain LoRAs of bounded rank, and the energy that this keeps."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.delta import LowRank
from pcb_peft.deltas.rank import truncate
from pcb_peft.deltas.rank_choice import LOSSLESS, FixedRank
from pcb_peft.formats.lazy_delta import LazyDelta, as_dense, in_memory
from pcb_peft.merging.resolve_base import ia3_as_additive
from pcb_peft.runtime.progress import Track

SAMPLED = 8  # modules that a price is measured on
TRIED = (16, 64, 256)  # ranks of a price


def as_additions(adapter: Adapter, base: Callable[[], BaseModel] | None) -> Adapter:
    """Return the adapter with every change as something that is added to W.

    Raises:
        BaseModelError: A change depends on W, and no base model was given.
    """
    read = adapter if base is None else adapter.on(base)
    if base is not None and any(entry.kind.multiplies for entry in read.modules.entries.values()):
        read = ia3_as_additive(read, base())
    entries = {module: as_dense(entry) for module, entry in read.modules.entries.items()}
    return dataclasses.replace(read, modules=DeltaMapping(entries), reopen=None)


def at_most_rank(adapter: Adapter, rank: int, track: Track) -> tuple[Adapter, float]:
    """Return an adapter of which no module has a higher rank, and the retained fraction of its energy.

    Args:
        adapter: An adapter that only adds to W.
        rank: The rank.
        track: Shows progress.
    """
    entries = dict(adapter.modules.entries)
    total: list[float] = []
    retained: list[float] = []
    for module in track(list(entries), "cut the rank"):
        entry = entries[module]
        if entry.kind is LowRank and (entry.rank or 0) <= rank:
            energy = entry.load().norm() ** 2
            total.append(energy)
            retained.append(energy)
            continue
        delta = entry.load()
        cut, energy = truncate(delta, FixedRank(rank))
        total.append(delta.norm() ** 2)
        retained.append(energy * total[-1])
        entries[module] = dataclasses.replace(in_memory(cut), stacked=entry.stacked)
    whole = math.fsum(total)
    share = math.fsum(retained) / whole if whole else 1.0
    return dataclasses.replace(adapter, modules=DeltaMapping(entries), source=None), share


def without_spare_ranks(adapter: Adapter) -> Adapter:
    """Return the same adapter with every LoRA at the rank that its ΔW has, which may be lower than it is stored."""
    entries = dict(adapter.modules.entries)
    for module, entry in entries.items():
        if entry.kind is LowRank and not entry.stacked and entry.shape[1] > 1:
            cut, _ = truncate(entry.load(), LOSSLESS)
            if cut.rank < (entry.rank or 0):
                entries[module] = in_memory(cut)
    return dataclasses.replace(adapter, modules=DeltaMapping(entries))


def energies(entries: Mapping[str, LazyDelta]) -> tuple[dict[int, float], int]:
    """Measure the energy that LoRAs of a few ranks keep, on some of the modules.

    Returns:
        Rank to retained fraction of the energy, and the number of modules that were measured.
    """
    modules = _spread(list(entries), SAMPLED)
    kept, whole = dict.fromkeys(TRIED, 0.0), 0.0
    for module in modules:
        delta = entries[module].load()
        cut, energy = truncate(delta, FixedRank(TRIED[-1]))
        squares = cut.lora_A.double().square().sum(1).square()  # σ² of the balanced factors
        whole += float(squares.sum()) / energy if energy else 0.0
        for rank in TRIED:
            kept[rank] += float(squares[:rank].sum())
    return {rank: value / whole if whole else 1.0 for rank, value in kept.items()}, len(modules)


def _spread(items: Sequence[str], count: int) -> list[str]:
    """Return so many items, from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]
