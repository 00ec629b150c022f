"""Response: the share of each adapter's own effect that a merge keeps."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from pcb_peft.calibrations.registry import after
from pcb_peft.deltas.delta import MATRICES, Delta, Diagonal
from pcb_peft.deltas.inner import inner
from pcb_peft.plugins.options import Range


def _products(merged: Delta, deltas: Sequence[Delta]) -> Tensor:
    """Inner products (T + 1, T + 1) of the adapters' deltas and, last, of the merge."""
    every = [*deltas, merged]
    products = torch.zeros(len(every), len(every), dtype=torch.float64)
    for i, first in enumerate(every):
        for j, second in enumerate(every[: i + 1]):
            products[i, j] = products[j, i] = inner(first, second)
    return products


@after("response", paper="none", accepts=(*MATRICES, Diagonal), survey=_products)
def response(
    merged: Delta,
    deltas: Sequence[Delta],
    products: Tensor | None = None,
    *,
    least: Annotated[float, Range(0, 1)] = 0.0,
    per: Literal["module", "model"] = "module",
) -> Delta:
    """Scale the merge so that it keeps the right share of each adapter's own response.

    The share is c = mean_t ⟨M, ΔW_t⟩ / ‖ΔW_t‖²: 1 where the merge M does to every adapter's own directions what that
    adapter does. With T_eff = T Σ_t ‖ΔW_t‖² / ‖Σ_t ΔW_t‖² the merge is scaled to c = max(least, T_eff^(−1/3)). T_eff is
    T for adapters that have nothing in common and 1 for copies of one adapter, which come back as they are.

    A merge that has no positive response has no right scale, and is left as it is. Where adapters take each other back,
    so that ‖Σ_t ΔW_t‖² is less than half of Σ_t ‖ΔW_t‖², c is smaller by that fraction of the half: what is left of a
    difference is not blown up.

    Args:
        least: The smallest c. T_eff^(−1/3), the default, suits merges that keep the adapters' singular values; 0.7 is
            better where all directions are equally strong, as after `iso_c`.
        per: What gets a factor of its own: each module, or the model as a whole.

    Source: new here, 2026. Eight methods on 2, 4 and 8 tasks have their best weight at about this c, whatever the norm
    of the merge is there.
    """
    products = _products(merged, deltas) if per == "module" or products is None else products
    own, adapters = products[-1, :-1], products[:-1, :-1]
    squares = adapters.diagonal()
    touched = squares > 0
    if not touched.any():
        return merged
    share = (own[touched] / squares[touched]).mean()
    # ‖Σ_t ΔW_t‖² / Σ_t ‖ΔW_t‖² = T / T_eff
    kept = float((adapters.sum() / squares.sum()).clamp(min=0))
    goal = max(least, (kept / int(touched.sum())) ** (1 / 3)) * min(1, 2 * kept)
    return merged.scaled(goal / float(share)) if share > 0 else merged
