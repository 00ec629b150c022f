"""Experts one by one, as changes of the stacks that hold them in memory.

``experts.3.gate_proj`` and ``experts.3.up_proj`` are rows of ``experts.gate_up_proj.3``. Two LoRAs of rank r on the
parts are one of rank 2r on the whole: lora_A on top of each other, lora_B side by side, each in the rows of its part.
"""

import dataclasses
import functools
from collections.abc import Mapping

import torch

from pcb_peft.base.architecture import PlaceInStack, Skeleton
from pcb_peft.deltas.delta import Dense, LowRank
from pcb_peft.deltas.layout import CONV1D, LINEAR
from pcb_peft.formats import LazyDelta


def stacked(entries: Mapping[str, LazyDelta], skeleton: Skeleton) -> dict[str, LazyDelta]:
    """Return deltas with the experts among them as matrices of stacks.

    Args:
        entries: Deltas by module.
        skeleton: The architecture, which has the stacks.
    """
    parts: dict[str, list[tuple[PlaceInStack, LazyDelta]]] = {}
    result: dict[str, LazyDelta] = {}
    for module, entry in entries.items():
        place = skeleton.place_in_stack(module) if entry.kind in (LowRank, Dense) else None
        if place is None:
            result[module] = entry
        else:
            parts.setdefault(f"{place.stack}.{place.index}", []).append((place, entry))
    for module, each in parts.items():
        ranks = [entry.rank for _, entry in each]
        rank = None if None in ranks else sum(rank or 0 for rank in ranks)
        place, first = each[0]
        shape = skeleton.shape(place.stack)
        outputs = shape[2 if place.transposed else 1]
        result[module] = LazyDelta(
            kind=Dense if rank is None else LowRank,
            shape=(outputs, first.shape[1]),
            load=functools.partial(_fused, each, outputs),
            rank=rank,
            stacked=True,
        )
    return result


def _fused(parts: list[tuple[PlaceInStack, LazyDelta]], outputs: int) -> LowRank | Dense:
    """Return the change of an expert's whole matrix."""
    place = parts[0][0]
    layout = dataclasses.replace(CONV1D if place.transposed else LINEAR, expert=place.index)
    deltas = [(place.rows or (0, outputs, 1), entry.load()) for place, entry in parts]
    if not all(isinstance(delta, LowRank) for _, delta in deltas):
        values = torch.zeros(outputs, parts[0][1].shape[1])
        for rows, delta in deltas:
            values[slice(*rows)] = delta.matrix()
        return Dense(values, layout=layout)
    factors = [(rows, *delta.factors()) for rows, delta in deltas]
    lora_A = torch.cat([lora_A for _, _, lora_A in factors])
    lora_B, start = torch.zeros(outputs, len(lora_A), dtype=lora_A.dtype), 0
    for rows, part_B, part_A in factors:
        lora_B[slice(*rows), start : start + len(part_A)] = part_B
        start += len(part_A)
    return LowRank(lora_A.float(), lora_B.float(), layout=layout)
