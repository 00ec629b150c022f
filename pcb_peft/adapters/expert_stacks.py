"""Experts one by one as changes of the stacks that hold them in memory; layers that are fused, or split, likewise.

``experts.3.gate_proj`` and ``experts.3.up_proj`` are rows of ``experts.gate_up_proj.3``. Two LoRAs of rank r on the
parts are one of rank 2r on the whole: lora_A on top of each other, lora_B side by side, each in the rows of its part.
The same holds for ``q_proj``, ``k_proj`` and ``v_proj`` of a model that has ``qkv_proj``. The other way, a LoRA on
``qkv_proj`` is one on each part: the same lora_A, and some rows of lora_B.
"""

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from pcb_peft.base.architecture import FUSED, PlaceInStack, Skeleton
from pcb_peft.base.conversions import conversions_of
from pcb_peft.deltas.delta import Dense, LowRank
from pcb_peft.deltas.layout import CONV1D, LINEAR
from pcb_peft.formats.lazy_delta import LazyDelta, only_rows


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
            parts.setdefault(_module(place), []).append((place, entry))
    for module, each in parts.items():
        ranks = [entry.rank for _, entry in each]
        rank = None if None in ranks else sum(rank or 0 for rank in ranks)
        place, first = each[0]
        matrix = skeleton.shape(place.stack)[0 if place.index is None else 1 :]
        outputs = matrix[1 if place.transposed else 0]
        result[module] = LazyDelta(
            kind=Dense if rank is None else LowRank,
            shape=(outputs, first.shape[1]),
            load=functools.partial(_fused, each, outputs),
            rank=rank,
            stacked=place.index is not None,
        )
    return result


def _module(place: PlaceInStack) -> str:
    if place.index is None:
        return place.stack.removesuffix(".weight")
    return f"{place.stack}.{place.index}"


def without_fused_layers(
    entries: Mapping[str, LazyDelta], skeleton: Skeleton
) -> dict[str, LazyDelta]:
    """Return deltas with those of layers that the model has split as deltas of their parts.

    Args:
        entries: Deltas by module.
        skeleton: The architecture.
    """
    result: dict[str, LazyDelta] = {}
    for module, entry in entries.items():
        parts = _parts(module, entry, skeleton) if entry.kind in (LowRank, Dense) else {}
        for part, rows in parts.items():
            result[part] = only_rows(entry, rows, len(rows))
        if not parts:
            result[module] = entry
    return result


def _parts(module: str, entry: LazyDelta, skeleton: Skeleton) -> dict[str, Tensor]:
    """Return the parts in memory of a layer that is fused elsewhere, with their rows in it; none for other modules."""
    if skeleton.in_model(f"{module}.weight") or skeleton.in_model(module):
        return {}
    conversions = conversions_of(skeleton, [f"{module}.weight"])
    outputs = entry.shape[0]
    for conversion in conversions.values():  # the same one for all parts
        if len(conversion.parameters) > 1:
            rows = conversion.rows(outputs)
            return {name.removesuffix(".weight"): numbers for name, numbers in rows.items()}
    container, _, leaf = module.rpartition(".")
    names = [skeleton.in_model(f"{container}.{part}.weight") for part in FUSED.get(leaf, ())]
    known = [name for name in names if name is not None]
    heights = [skeleton.shape(name)[0] for name in known]
    if len(known) < len(names) or sum(heights) != outputs:
        return {}
    split = torch.arange(outputs).split(heights)
    return {name.removesuffix(".weight"): rows for name, rows in zip(known, split, strict=True)}


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
