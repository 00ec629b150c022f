"""SCE: select, calculate, erase."""

from torch import Tensor

from pcb_peft.methods.ops import majority_sign_mask, normalized, num_kept
from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Density
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method("sce", paper="arXiv:2408.07990", scope="module", identity_on_one=True)
def sce(tasks: TaskVectors, *, density: Density = 0.1) -> Merged:
    """Select entries on which tasks differ, weigh tasks by their energy there, erase minority signs, add.

    δ_t is τ_t where the variance over the tasks is among the largest, else 0. Then τ_m = Σ_t λ_t η_t δ_t [t has the
    elected sign] with η_t = ‖δ_t‖² / Σ_s ‖δ_s‖².

    Args:
        density: Fraction of entries selected, the same for all tasks.

    Good at: models that complement each other, says its paper.

    Measured: LoRA 79.6 (63.4).

    Source: Wan et al. 2024 (FuseChat), the three steps and task arithmetic with η. Differences: entries that tie with
    the smallest selected variance are selected; weights, which the paper does not have, scale the selected task vectors
    before the election; signs as in `ties`. (The authors' code, github.com/fanqiwan/FuseAI at 7d9a307, selects only to
    compute η, and merges all entries of τ_t. It and mergekit divide by Σ η_t over the tasks with the elected sign, and
    count the density among the entries in which tasks differ.)
    """

    def variance(x: Tensor) -> Tensor:
        return (x - x.mean(0)).square().sum(0, keepdim=True)

    smallest = tasks.order_statistics(variance, [tasks.size - num_kept(tasks, density)])[..., 0]

    def select(x: Tensor) -> Tensor:
        return x * (variance(x) >= smallest)

    eta = normalized(tasks.sums(lambda x: select(x).square()))

    def merge(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        weighted = weights * select(x)
        elected = weighted * majority_sign_mask(weighted)
        return (eta * elected).sum(0), elected

    return tasks.combine(merge)
