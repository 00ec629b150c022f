"""Factor space: lora_A and lora_B themselves."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, LowRank, Rescaled
from pcb_peft.deltas.linalg import pad_rows
from pcb_peft.deltas.rank import balanced
from pcb_peft.spaces.registry import Projection, space
from pcb_peft.tasks.blocks import stacked


def _as_trained(delta: Delta) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) as they are stored, each times the root of the scaling, whose sign goes to lora_A."""
    lora_B, lora_A = delta.factors()
    if isinstance(delta, LowRank) and delta.scaling < 0:
        return -lora_A, -lora_B
    return lora_A, lora_B


GAUGES: dict[str, Callable[[Delta], tuple[Tensor, Tensor]]] = {
    "balanced": balanced,
    "as_trained": _as_trained,
}


@space("factor", accepts=(LowRank, Rescaled), low_rank_output=True)
def factor(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    gauge: Literal["balanced", "as_trained"] = "balanced",
) -> Projection:
    """The entries of lora_A and lora_B, each merged by itself; smaller ranks are padded with zeros.

    A weight λ enters as √|λ| on both sides, with its sign on lora_A, as in PEFT. (kohya's `merge_lora` multiplies both
    sides by |λ|, so that 0.5 acts as 0.25.) The product of merged factors is not the merge of the products: even
    `linear` has cross terms here.

    Args:
        gauge: Which factors are merged: (BG, G⁻¹A) is the same adapter for every invertible G. `balanced` uses B = U√Σ
            and A = √ΣVᵀ, which do not depend on G; `as_trained` uses the stored factors, as PEFT's
            `add_weighted_adapter` does.
    """
    pairs = [GAUGES[gauge](delta) for delta in deltas]
    rank = max(lora_A.shape[0] for lora_A, _ in pairs)
    lora_A = torch.stack([pad_rows(a, rank) for a, _ in pairs])
    lora_B = torch.stack([pad_rows(b.T, rank).T for _, b in pairs])
    roots = [math.sqrt(abs(weight)) for weight in weights]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
    layout = deltas[0].layout
    blocks = (stacked(lora_A, signed), stacked(lora_B, roots))
    return Projection(
        blocks, lambda merged: LowRank(merged[0].float(), merged[1].float(), layout=layout)
    )
