r"""Other forms of `flat` that were tried, as methods which `run.py` measures.

    python benchmarks/quality/tried.py -o tried.jsonl --pool minilm8=pools/minilm8 --split validation --limit 200 \
        --bfloat16 --weight-one flat "own power=0.5|1" "sum rank=16 power=0|0.5" "pcb_directions rank=16"

It takes the arguments of `run.py`, and its methods beside those of the package. All have the scale of `flat`.
"""

from typing import Literal

import run
import torch
from torch import Tensor

from pcb_peft import merge_method
from pcb_peft.deltas.linalg import cat_svds, significant
from pcb_peft.methods.spectral import leading, merge_matrices, without_overlap
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method("own", paper="none", scope="module", whole_matrix=True)
def own(tasks: TaskVectors, *, power: float = 0.25, norms: float = 0.0) -> Merged:
    """Give each adapter's own directions the strengths σ^power ‖X_t‖^norms; `flat` has the powers 1/4 and 0."""

    def merge(x: Tensor) -> Tensor:
        u, _, vh = cat_svds([significant(matrix) for matrix in x])
        strengths = [significant(m)[1] ** power * m.norm() ** norms for m in x]
        return scaled(without_overlap((u, torch.cat(strengths), vh)), x)

    return merge_matrices(tasks, merge)


@merge_method("balanced", paper="none", scope="module", whole_matrix=True)
def balanced(tasks: TaskVectors, *, power: float = 0.25) -> Merged:
    """Scale each adapter's own directions σ^power until the merge keeps the same response of every adapter."""

    def merge(x: Tensor) -> Tensor:
        u, _, vh = cat_svds([significant(matrix) for matrix in x])
        strengths = [significant(m)[1] ** power for m in x]
        factors = torch.ones(len(x), dtype=x.dtype)
        for _ in range(20):
            weighted = torch.cat([f * s for f, s in zip(factors, strengths, strict=True)])
            merged = without_overlap((u, weighted, vh))
            share = ((merged * x).sum((1, 2)) / x.square().sum((1, 2))).clamp(min=1e-3)
            factors = factors * (share.mean() / share) ** 0.5
        return scaled(merged, x)

    return merge_matrices(tasks, merge)


@merge_method("sum", paper="none", scope="module", whole_matrix=True)
def of_the_sum(tasks: TaskVectors, *, power: float = 0.25, rank: int | None = None) -> Merged:
    """Give the strongest directions of the sum the strengths n_k^power; `flat` has the power 1/4."""

    def merge(x: Tensor) -> Tensor:
        sizes = x.square().sum((1, 2)).sqrt()[:, None]
        u, _, vh = leading(significant(x.sum(0), scale=sizes.norm()), rank)
        along = ((u.T @ x) * vh).sum(-1).square()
        strengths = (along / sizes).sum(0) / (along / sizes.square()).sum(0)
        return scaled((u * strengths**power) @ vh, x)

    return merge_matrices(tasks, merge)


@merge_method("pcb_directions", paper="none", scope="module", whole_matrix=True)
def pcb_directions(
    tasks: TaskVectors, *, strengths: Literal["flat", "scores"] = "flat", rank: int | None = None
) -> Merged:
    """Let the directions of the sum compete by PCB's scores: significance within a task × agreement of the tasks.

    Args:
        strengths: scores: what the adapters have along a direction, weighted by the scores, as PCB does with entries;
            flat: those of `flat`, so that the scores only choose.
        rank: How many directions stay.
    """

    def merge(x: Tensor) -> Tensor:
        sizes = x.square().sum((1, 2)).sqrt()[:, None]
        u, _, vh = significant(x.sum(0), scale=sizes.norm())
        along = ((u.T @ x) * vh).sum(-1)  # (T, k): what each adapter has along each direction
        shares = along / sizes
        within = torch.softmax(shares.square() / shares.square().amax(1, keepdim=True), 1)
        agreement = shares * shares.sum(0)
        between = torch.softmax(agreement / agreement.abs().max(), 0)
        scores = within * between * shares.abs()
        stay = scores.sum(0).topk(min(rank or scores.shape[1], scores.shape[1])).indices
        part = scores[:, stay] / scores[:, stay].sum(0)
        merged = (
            (part * along[:, stay]).sum(0)
            if strengths == "scores"
            else (part * sizes).sum(0) ** 0.25
        )
        return scaled((u[:, stay] * merged) @ vh[stay], x)

    return merge_matrices(tasks, merge)


def scaled(directions: Tensor, x: Tensor) -> Tensor:
    """Scale a merge as `flat` does: to the same share c of the adapters' own response."""
    along, squares = (directions * x).sum((1, 2)), x.square().sum((1, 2))
    share = torch.maximum((along / squares).mean(), along.sum() / squares.sum())
    kept = x.sum(0).square().sum() / squares.sum()
    c = max(0.7, (float(kept) / len(x)) ** (1 / 6)) * min(1, 2 * float(kept))
    return c / share * directions


if __name__ == "__main__":
    run.main()
