"""DoRA among LoRAs: whether the merged adapter is saved as a DoRA, or falls back to a LoRA.

A DoRA rescales the rows of W and adds to them; a LoRA only adds.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.deltas.delta import LowRank, Rescaled
from pcb_peft.errors import BaseModelError, MismatchError
from pcb_peft.formats import Base, BaseWeight, LazyDelta, Weights
from pcb_peft.formats.lora_parts import IN_PROJ
from pcb_peft.merging.report import ReportBuilder
from pcb_peft.merging.resolve_base import rescaling_as_dense

WHY = "the merged adapter is a DoRA, which rescales W"
SAVED_AS_LORA = (
    "the space, the method or a calibration works on ΔW as a whole, so the rescaling of a DoRA was merged as a part of "
    "ΔW: the result is saved as a LoRA"
)


def fall_back_to_lora(adapters: Sequence[Adapter], base: Base) -> tuple[list[Adapter], list[str]]:
    """Turn DoRAs into LoRAs where one DoRA in PEFT's form could not hold the whole merge.

    A DoRA holds no experts, no joint projection of an attention, and nothing of full rank.

    Args:
        adapters: The adapters that are merged.
        base: The base model, if there is one.

    Returns:
        The adapters, and a note for the report if they were changed.
    """
    if not _any_rescales(adapters):
        return list(adapters), []
    replaced = {name for adapter in adapters for name in adapter.head.parameters}
    for adapter in adapters:
        for module, entry in adapter.modules.entries.items():
            obstacle = _obstacle(module, entry, base or adapter.base)
            if f"{module}.weight" in replaced:
                obstacle = "is added to a weight that an adapter brings along"
            if module.endswith(".bias") and base is None:
                obstacle = "is the change of a bias, not the bias itself (base_model is not given)"
            if obstacle:
                note = (
                    f"{module} of {adapter.name} {obstacle}, which no DoRA holds: the rescaling of W is merged as a "
                    "part of ΔW, and the result is saved as a LoRA"
                )
                return [rescaling_as_dense(adapter) for adapter in adapters], [note]
    return list(adapters), []


def _any_rescales(adapters: Sequence[Adapter]) -> bool:
    return any(entry.kind.rescales for a in adapters for entry in a.modules.entries.values())


def _obstacle(module: str, entry: LazyDelta, base: Base) -> str:
    """Say why no DoRA holds a module's delta; empty where one does."""
    if entry.kind not in (LowRank, Rescaled):
        return f"is a {entry.kind.kind_name} delta"
    if entry.stacked:
        return "is one of several matrices in a parameter"
    if module.endswith(IN_PROJ):
        return "is a part of MultiheadAttention"
    known = entry.kind.rescales or (base is not None and _has(base, module))
    return "" if known else "is added to a weight that is not known, or not given (base_model)"


def _has(base: Callable[[], Weights], module: str) -> bool:
    try:
        return bool(base().shape(module))
    except (BaseModelError, MismatchError):
        return False


def lift_to_dora(
    entries: Mapping[str, LazyDelta],
    base: Base,
    adapters: Sequence[Adapter],
    report: ReportBuilder,
) -> dict[str, LazyDelta]:
    """Give every matrix of the result a DoRA's rescaling, if only by 1, where one of them has it.

    Args:
        entries: The result of the merge, by module.
        base: The base model, from which W is read; by default the one that an adapter was read beside.
        adapters: The adapters that were merged.
        report: Gets a note where adapters rescale W and the result does not.
    """
    kinds = {entry.kind for entry in entries.values()}
    if _any_rescales(adapters) and kinds == {LowRank}:
        report.note(SAVED_AS_LORA)
    base = base or next((adapter.base for adapter in adapters if adapter.base), None)
    if base is None or not any(kind.rescales for kind in kinds):
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
    """A delta with a rescaling of the base model's W."""
    delta = entry.load()
    layout = delta.layout if delta.layout.lookup else base().layout(module, entry.shape)
    no_gain = torch.zeros(entry.shape[0], dtype=torch.float64)
    return Rescaled(
        delta.gain if isinstance(delta, Rescaled) else no_gain,
        delta.low_rank_part,
        BaseWeight(base, module, entry.shape, WHY, layout),
        layout=layout,
    )
