"""Adapters of which some rescale W and others only add to it: what their merge can leave as."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.deltas.delta import LowRank, Rescaled
from pcb_peft.errors import BaseModelError, MismatchError
from pcb_peft.formats import Base, BaseWeight, LazyDelta, Weights
from pcb_peft.formats.lora_parts import IN_PROJ
from pcb_peft.merging.report import Report
from pcb_peft.merging.resolve_base import rescaling_as_dense

WHY = "the merged adapter rescales W"
WHOLE = (
    "what rescales W was seen as the matrix that it adds to W, by the space, the method or a calibration: it leaves as "
    "a LoRA"
)


def fall_back_to_lora(adapters: Sequence[Adapter], base: Base) -> tuple[list[Adapter], list[str]]:
    """The same adapters, and a note for the report if what rescales W has become an addition to it.

    That is where one adapter in PEFT's form could not hold all that they change: a DoRA holds no experts, no joint
    projection of an attention, nothing of full rank.

    Args:
        adapters: Those that are merged.
        base: The base model, if there is one.
    """
    if not _rescaling(*adapters):
        return list(adapters), []
    replaced = {name for adapter in adapters for name in adapter.head.parameters}
    for adapter in adapters:
        known = base or adapter.base
        for module, entry in adapter.modules.entries.items():
            obstacle = _obstacle(module, entry, known)
            if f"{module}.weight" in replaced:
                obstacle = "is added to a weight that an adapter brings along"
            if module.endswith(".bias") and base is None:
                obstacle = "is the change of a bias, not the bias itself (base_model is not given)"
            if obstacle:
                note = (
                    f"{module} of {adapter.name} {obstacle}, which no DoRA holds: what rescales W is merged as what it "
                    "adds to W, and leaves as a LoRA"
                )
                return [rescaling_as_dense(adapter) for adapter in adapters], [note]
    return list(adapters), []


def _rescaling(*adapters: Adapter) -> bool:
    return any(entry.kind is Rescaled for a in adapters for entry in a.modules.entries.values())


def _obstacle(module: str, entry: LazyDelta, base: Base) -> str:
    """Why no DoRA holds a change, whatever else changes; empty where one does."""
    if entry.kind not in (LowRank, Rescaled):
        return f"is a {entry.kind.__name__} delta"
    if entry.stacked:
        return "is one of several matrices in a parameter"
    if module.endswith(IN_PROJ):
        return "is a part of MultiheadAttention"
    known = entry.kind is Rescaled or (base is not None and _holds(base, module))
    return "" if known else "is added to a weight that is not known, or not given (base_model)"


def _holds(base: Callable[[], Weights], module: str) -> bool:
    try:
        return bool(base().shape(module))
    except (BaseModelError, MismatchError):
        return False


def lift_to_dora(
    entries: Mapping[str, LazyDelta], base: Base, adapters: Sequence[Adapter], report: Report
) -> dict[str, LazyDelta]:
    """The result of a merge; where it rescales some W, all matrices are rescaled, if only by 1.

    Where adapters rescale W and it does not, the report says so.

    Args:
        entries: By module.
        base: The base model, from which W is read; by default what one of the adapters was read beside.
        adapters: Those that were merged.
        report: Of the merge.
    """
    kinds = {entry.kind for entry in entries.values()}
    if _rescaling(*adapters) and kinds == {LowRank}:
        report.note(WHOLE)
    base = base or next((adapter.base for adapter in adapters if adapter.base), None)
    if base is None or Rescaled not in kinds:
        return dict(entries)
    return {
        module: dataclasses.replace(
            entry, kind=Rescaled, load=functools.partial(_rescaled, module, entry, base)
        )
        if len(base().shape(module)) > 1
        else entry
        for module, entry in entries.items()
    }


def _rescaled(module: str, entry: LazyDelta, base: Callable[[], Weights]) -> Rescaled:
    """A delta on W of the base model."""
    delta = entry.load()
    layout = delta.layout if delta.layout.lookup else base().layout(module, entry.shape)
    none = torch.zeros(entry.shape[0], dtype=torch.float64)
    return Rescaled(
        delta.gain if isinstance(delta, Rescaled) else none,
        delta.low_rank_part,
        BaseWeight(base, module, entry.shape, WHY, layout),
        layout=layout,
    )
