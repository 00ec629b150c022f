"""Matrices that PEFT saves beside a LoRA though nobody trained them.

Where a LoRA sits on an embedding or an output layer, PEFT also saves the layer's own matrix (``lm_head.base_layer``).
It is the base model's, often rounded to another dtype, and no head: adapters do not compete for it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.replacements import ReplacedParameter
from pcb_peft.errors import BaseModelError, MismatchError

ROUNDED_TO = (torch.bfloat16, torch.float16)


def without_untrained_copies(
    adapters: Sequence[Adapter], base: Callable[[], BaseModel] | None
) -> tuple[list[Adapter], list[str]]:
    """Leave out the base model's own matrices beside deltas.

    Args:
        adapters: The adapters that are merged.
        base: The base model; without it nothing is left out.

    Returns:
        The adapters, and a note for each one that had such matrices.
    """
    if base is None:
        return list(adapters), []
    kept: list[Adapter] = []
    notes: list[str] = []
    for adapter in adapters:
        copies = [
            name for name in beside_deltas(adapter) if _is_copy(name, adapter.head.parameters, base)
        ]
        if not copies:
            kept.append(adapter)
            continue
        head = adapter.head.without(copies)
        head = dataclasses.replace(head, rows=adapter.head.rows, copies=adapter.head.copies)
        kept.append(dataclasses.replace(adapter, head=head))
        notes.append(
            f"{adapter.name}: {', '.join(copies)} beside the deltas is the base model's own, and is left out"
        )
    return kept, notes


def beside_deltas(adapter: Adapter) -> list[str]:
    """Return the parameters that an adapter replaces in modules that have a delta, too."""
    return [name for name in adapter.head.parameters if name.rpartition(".")[0] in adapter.modules]


def equal_up_to_rounding(fine: Tensor, coarse: Tensor) -> bool:
    """Return whether two float32 tensors are equal, or the second is the first, rounded to 16 bits."""
    if fine.shape != coarse.shape:
        return False
    return torch.equal(fine, coarse) or any(
        torch.equal(fine.to(dtype).float(), coarse) for dtype in ROUNDED_TO
    )


def _is_copy(
    name: str, parameters: Mapping[str, ReplacedParameter], base: Callable[[], BaseModel]
) -> bool:
    module, _, kind = name.rpartition(".")
    try:
        model = base()
        if kind != "weight" or model.shape(module) != parameters[name].shape:
            return False
        copy, own = parameters[name](), model.weight(module).float()
        return equal_up_to_rounding(copy, own) or equal_up_to_rounding(own, copy)
    except (BaseModelError, MismatchError):
        return False
