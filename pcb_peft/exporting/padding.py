"""Zeros in a LoRA, which change nothing: for a higher rank, and for modules without a LoRA."""

import dataclasses
import functools
import re
from collections.abc import Mapping

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.deltas.delta import LowRank
from pcb_peft.deltas.layout import Layout
from pcb_peft.errors import MismatchError, OptionError
from pcb_peft.formats.lazy_delta import LazyDelta

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def padded_to(adapter: Adapter, rank: int) -> Adapter:
    """Return the same changes at a higher rank.

    Raises:
        OptionError: The adapter has a higher rank than that.
    """
    entries = adapter.modules.entries
    highest = max((entry.rank or 0 for entry in entries.values()), default=0)
    if highest > rank:
        raise OptionError(
            f"{adapter.name} has rank {highest}, and is to be padded to {rank}; give max_rank={rank} "
            f"(--max-rank {rank}), too"
        )
    padded = {
        module: dataclasses.replace(entry, load=functools.partial(_padded, entry, rank), rank=rank)
        for module, entry in entries.items()
    }
    return dataclasses.replace(adapter, modules=DeltaMapping(padded))


def _padded(entry: LazyDelta, rank: int) -> LowRank:
    delta = entry.load().low_rank_part
    if not isinstance(delta, LowRank):
        lora_B, lora_A = delta.factors()
        delta = LowRank(lora_A, lora_B, layout=delta.layout)
    lora_A, lora_B = delta.padded(rank)
    return LowRank(lora_A, lora_B, layout=delta.layout)


def filled(adapter: Adapter, layers: int | None) -> Adapter:
    """Return the same adapter with zeros on every module that another layer has a LoRA on.

    Args:
        adapter: The adapter.
        layers: Number of layers of the base model; None: as many as the adapter touches.
    """
    entries = dict(adapter.modules.entries)
    kinds: dict[str, LazyDelta] = {}
    highest = (layers or 0) - 1
    for module, entry in entries.items():
        if number := _LAYER.search(module):
            kinds.setdefault(_LAYER.sub("{}", module, count=1), entry)
            highest = max(highest, int(number[0]))
    for kind, entry in kinds.items():
        for layer in range(highest + 1):
            entries.setdefault(kind.format(layer), _zeros(entry))
    return dataclasses.replace(adapter, modules=DeltaMapping(entries))


def like(adapter: Adapter, other: Adapter) -> Adapter:
    """Return the same adapter on the modules of another, so that a server swaps the two without recompiling.

    Raises:
        MismatchError: The adapter has modules that the other lacks, or shapes differ.
    """
    entries, there = adapter.modules.entries, other.modules.entries
    if more := sorted(entries.keys() - there.keys()):
        raise MismatchError(
            f"{adapter.name} changes {more[0]}, which {other.name} does not: they cannot be swapped; export "
            f"{other.name} like {adapter.name} instead (--like {adapter.name}), or both with dense=True (--dense)"
        )
    for module, entry in entries.items():
        if entry.shape != there[module].shape:
            raise MismatchError(
                f"{module} is {entry.shape} in {adapter.name} and {there[module].shape} in {other.name}: they belong "
                "to different base models"
            )
    complete: Mapping[str, LazyDelta] = {
        module: entries.get(module) or _zeros(entry) for module, entry in there.items()
    }
    return dataclasses.replace(adapter, modules=DeltaMapping(complete))


def _zeros(entry: LazyDelta) -> LazyDelta:
    """Return the entry of a module like another, without a change."""
    layout = entry.load().layout
    load = functools.partial(_zero, entry.shape, layout)
    return LazyDelta(LowRank, entry.shape, load, 1, stacked=entry.stacked)


def _zero(shape: tuple[int, int], layout: Layout) -> LowRank:
    return LowRank(torch.zeros(1, shape[1]), torch.zeros(shape[0], 1), layout=layout)
