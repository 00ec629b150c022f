"""Multi-SLERP: the mean direction, at the mean length."""

from pcb_peft.methods.ops import average_on_sphere, normalize_direction
from pcb_peft.methods.registry import merge_method
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method("multislerp", paper="goddard.blog", scope="module", identity_on_one=True)
def multislerp(tasks: TaskVectors) -> Merged:
    """Average the directions of the task vectors, at their average length.

    With u_t = τ_t / ‖τ_t‖ and w_t = λ_t / Σ_s |λ_s|: the direction of Σ_t w_t u_t, with the length of the mean |λ|
    times Σ_t |w_t| ‖τ_t‖. If the directions cancel, their sum is used as it is.

    Good at: an average without a weight to tune.

    Measured: LoRA 82.4 (52.9).

    Source: Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea, and mergekit's `multislerp`, which it equals to
    rounding for λ ≥ 0 whose mean is 1. mergekit then interpolates in the tangent space at this mean, which changes
    nothing: its tangents are orthogonal projections, whose weighted sum is 0 there. (With logarithms instead it would
    be the first step of `karcher`.) Differences: a negative λ turns its task vector around; the length includes the
    mean |λ|; a zero task vector is left out.
    """
    return average_on_sphere(tasks, normalize_direction)
