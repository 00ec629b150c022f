"""Selective task arithmetic."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pcb_peft.methods.ops import magnitude_threshold
from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Density
from pcb_peft.tasks.blocks import Index, View
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method(
    "sta", paper="arXiv:2411.16139", space="core", scope="module", needs_statistic="gradient"
)
def sta(tasks: TaskVectors, *, density: Density = 0.5) -> Merged:
    """Keep of each task vector the entries that its own loss depends on most, then add: τ_m = Σ_t λ_t τ_t m_t.

    m_t marks the largest |τ_t ⊙ g_t|, where g_t is the gradient of the task's mean loss with its adapter in the model.
    To first order, that is how much the loss would change if the entry of τ_t were 0.

    Args:
        density: Fraction of entries kept per task vector, the most important ones.

    Good at: sparse task vectors, where labelled texts of each task are at hand.

    Measured: LoRA 79.1 (29.1).

    Source: Bowen et al. 2024: importance by a first-order Taylor expansion of the loss, a mask, task arithmetic. The
    full text was not at hand: where the gradient is taken (at the adapter, of the mean loss), the fraction that is kept
    and the default are ours. Differences: the entries are those of the space, where U and V turn the gradient as they
    turn ΔW; `dense` has the paper's. Entries that tie with the least important kept one are kept; those of importance 0
    are always dropped.
    """
    importance = tasks.with_task_statistics(with_gradients(lambda x, gradient: x * gradient))
    threshold = magnitude_threshold(importance, density)

    def select(x: Tensor, gradient: Tensor) -> Tensor:
        return x * ((x * gradient).abs() >= threshold)

    selected = tasks.with_task_statistics(with_gradients(select))
    return selected.combine(lambda x, weights: ((weights * x).sum(0), x))


def with_gradients(
    function: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Sequence[Tensor]], View]:
    """Make a view of a function of two tiles, the task vectors' and the gradients'."""

    def of_block(gradients: Sequence[Tensor]) -> View:
        def view(x: Tensor, rows: Index, cols: Index) -> Tensor:
            tile = [gradient[rows][:, cols] for gradient in gradients]
            return function(x, torch.stack(tile).to(x))

        return view

    return of_block
