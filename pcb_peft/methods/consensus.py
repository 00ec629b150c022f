"""Consensus merging with TALL masks."""

from typing import Annotated

from torch import Tensor

from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Range
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method("consensus", paper="arXiv:2405.07813", scope="module", identity_on_one=True)
def consensus(
    tasks: TaskVectors,
    *,
    tall: Annotated[float, Range(0, 100)] = 0.4,
    votes: Annotated[int, Range(0, 1000)] = 2,
) -> Merged:
    """Add, then keep the entries that matter to several tasks: τ_m [Σ_t m_t ≥ votes].

    τ_m = Σ_t λ_t τ_t, and m_t = [|λ_t τ_t| ≥ tall · |τ_m − λ_t τ_t|] is the TALL mask of task t. It takes no
    statistics: both scopes give the same.

    Args:
        tall: How large an entry must be, relative to all others together, to matter to its task; the paper's λ_t, which
            it picks from 0.2 to 0.6 per task by validation.
        votes: To how many tasks an entry must matter; the paper's k. 1 keeps what matters to one task alone ("selfish"
            weights), too. With fewer tasks than that, to all.

    Good at: dropping what only one task wants, according to its paper; far behind a sum here.

    Measured: LoRA 75.7 (63.8), at 0.7 77.0 (65.2).

    Source: Wang et al. 2024, TALL masks and consensus merging, of task arithmetic. Departures: one `tall` for all
    tasks; k is at most T. (The authors' code, github.com/nik-dim/tall_masks, has > in the place of ≥.)
    """

    def merge(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        x = weights * x
        merged = x.sum(0)
        matters = x.abs() >= tall * (merged - x).abs()
        agreed = matters.sum(0) >= min(votes, tasks.tasks)
        return merged * agreed, x * agreed

    return tasks.combine(merge)
