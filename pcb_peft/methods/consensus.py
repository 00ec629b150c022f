"""Consensus merging with TALL masks."""

from typing import Annotated

from torch import Tensor

from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Range
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method(
    "consensus", paper="arXiv:2405.07813", space="knots", scope="module", identity_on_one=True
)
def consensus(
    tasks: TaskVectors,
    *,
    tall: Annotated[float, Range(0, 100)] = 0.4,
    votes: Annotated[int, Range(0, 1000)] = 2,
) -> Merged:
    """Add, then keep the entries that matter to several tasks: τ_m [Σ_t m_t ≥ votes].

    τ_m = Σ_t λ_t τ_t, and m_t = [|λ_t τ_t| ≥ tall · |τ_m − λ_t τ_t|] is the TALL mask of task t. No statistics are
    taken, so both scopes give the same result. In `core` space few entries matter to two tasks.

    Args:
        tall: How large an entry must be, relative to all others together, to matter to its task. The paper's λ_t, which
            it picks between 0.2 and 0.6 per task on validation data.
        votes: To how many tasks an entry must matter; the paper's k. 1 also keeps what matters to one task alone
            ("selfish" weights). With fewer tasks than votes, it must matter to all.

    Good at: dropping what only one task wants, says its paper.

    Measured: LoRA 84.3 (63.4).

    Source: Wang et al. 2024, TALL masks and consensus merging, on task arithmetic. Differences: one `tall` for all
    tasks; k is at most T. (The authors' code, github.com/nik-dim/tall_masks, compares with > instead of ≥.)
    """

    def merge(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        x = weights * x
        total = x.sum(0)
        tall_masks = x.abs() >= tall * (total - x).abs()
        agreed = tall_masks.sum(0) >= min(votes, tasks.tasks)
        return total * agreed, x * agreed

    return tasks.combine(merge)
