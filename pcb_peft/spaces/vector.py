"""Vector space of (IA)³ adapters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, Diagonal
from pcb_peft.spaces.registry import Projection, space
from pcb_peft.tasks.blocks import stacked


@space("vector", accepts=(Diagonal,), low_rank_output=True)
def vector(deltas: Sequence[Delta], weights: Sequence[float]) -> Projection:
    """Task vector l − 1 of an (IA)³ adapter: with `linear` the merged l is 1 + Σ λ (l − 1), never Σ λ l."""
    first = deltas[0]
    values = torch.stack([_task_vector(delta) for delta in deltas])

    def decode(merged: Sequence[Tensor]) -> Diagonal:
        l = 1 + merged[0][0].double()  # noqa: E741
        feedforward = isinstance(first, Diagonal) and first.feedforward
        return Diagonal(l.float(), feedforward, layout=first.layout)

    return Projection((stacked(values, weights),), decode)


def _task_vector(delta: Delta) -> Tensor:
    """The task vector l − 1 as a row (1, n)."""
    if not isinstance(delta, Diagonal):
        raise TypeError(f"{type(delta).__name__} is not diagonal")
    return delta.l.double()[None] - 1
