"""Orthonormal directions of nearly equal strength, at the right scale: flat merging."""

from typing import Annotated

import torch
from torch import Tensor

from pcb_peft.deltas.linalg import Svd, cat_svds, significant
from pcb_peft.methods.ops import clamp_positive
from pcb_peft.methods.registry import merge_method
from pcb_peft.methods.spectral import leading, merge_matrices, without_overlap
from pcb_peft.plugins.options import Range
from pcb_peft.tasks.task_vectors import Merged, TaskVectors

POWER = 0.25
"""Of the strengths: with 0 all directions would be equally strong, with 1 they would stay as they are."""


@merge_method("flat", paper="none", scope="module", identity_on_one=True, whole_matrix=True)
def flat(
    tasks: TaskVectors,
    *,
    response: Annotated[float, Range(0, 1, low_open=True)] = 0.7,
    rank: int | None = None,
) -> Merged:
    """Make the adapters' directions orthonormal and nearly equally strong, and scale them to the adapters.

    A direction is a pair of singular vectors: an output that is written where an input is seen. With X_t = λ_t ΔW_t:

    **All directions have room** (no `rank`, or one that holds them). The directions are the adapters' own, X_t =
    U_t Σ_t V_tᵀ, side by side: U = [U_1 … U_T], V = [V_1 … V_T], and

        ΔW = σ U_⊥ diag(Σ_1 … Σ_T)^(1/4) V_⊥ᵀ

    where U_⊥ is the matrix with orthonormal columns that is nearest to U.

    **A smaller rank k.** The directions are the first k singular pairs u_k, v_k of the sum X = Σ_t X_t, and

        ΔW = σ Σ_k n_k^(1/4) u_k v_kᵀ,    n_k = Σ_t p_tk ‖X_t‖,    p_tk ∝ (u_kᵀ X_t v_k / ‖X_t‖)²,    Σ_t p_tk = 1

    n_k is the mean norm of the adapters, each counted by its share p_tk in the direction.

    Strong directions would drown weak ones, and directions of one strength would drown the adapters that need more: the
    fourth root stands between. The scale σ is such that the merge keeps the share c of the adapters' own response,

        mean_t ⟨ΔW, X_t⟩ / ‖X_t‖² = c

    A c of 1 would do to every adapter's own directions what the adapter does, and disturb the others too much. An (IA)³
    vector has one direction: it is the sum, at the scale of T_eff.

    Args:
        response: The smallest c, where there are several directions. Fewer adapters, or such that have much in common,
            get a larger one: c = (T_eff)^(−1/6), where T_eff = T Σ_t ‖X_t‖² / ‖X‖² is T for adapters that have nothing
            in common and 1 for copies of one; of a single direction c = (T_eff)^(−1/3). Where adapters take each other
            back, so that ‖X‖² is less than half of the sum of squares, c is smaller in proportion.
        rank: k, the rank of the result; None: all directions stay.

    Good at: many tasks with every weight at 1, at full rank and at the rank of one adapter.

    Why so: see "How `flat` was chosen" in docs/methods.md.

    Measured: LoRA 93.0 (80.0); (IA)³ 86.9 (63.4).

    Source: the adapters' own directions side by side are those of TSV-Merge, Gargiulo et al. 2025; those of the sum are
    Iso-C's, Marczak et al. 2025, which makes all of them equally strong. The strengths, the scale, and choosing the
    rank first, are new.
    """
    return merge_matrices(tasks, lambda x: _merge(x, response, rank))


def _merge(x: Tensor, response: float, rank: int | None) -> Tensor:
    total, squares = x.sum(0), x.square().sum((1, 2))
    u, s, vh = cat_svds([significant(matrix) for matrix in x])
    count = len(s)
    if min(total.shape) > 1 and (rank is None or count <= rank):
        directions = without_overlap((u, s**POWER, vh))
    else:
        svd = leading(significant(total, scale=squares.sum().sqrt()), rank)
        directions, count = _of_the_sum(svd, x, squares), len(svd[1])
    along = (directions * x).sum((1, 2))
    share = torch.maximum((along / squares).mean(), along.sum() / squares.sum())  # the last is >= 0
    kept = float(total.square().sum() / squares.sum())  # T / T_eff
    least, power = (response, 1 / 6) if count > 1 else (0.0, 1 / 3)
    c = max(least, (kept / len(x)) ** power) * min(1, 2 * kept)
    return c / clamp_positive(share) * directions


def _of_the_sum(svd: Svd, x: Tensor, squares: Tensor) -> Tensor:
    u, _, vh = svd
    along = ((u.T @ x) * vh).sum(-1).square()  # (T, k)
    sizes = squares.sqrt()[:, None]
    norms = (along / sizes).sum(0) / (along / sizes.square()).sum(0)
    return (u * norms**POWER) @ vh
