"""SLERP: spherical linear interpolation."""

from typing import Annotated

import torch
from torch import Tensor

from pcb_peft.methods.ops import average_on_sphere, normalize_direction
from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Range
from pcb_peft.tasks.task_vectors import Merged, TaskVectors

SMALLEST_SINE = 1e-6  # sin Ω below which two vectors count as parallel or opposite


@merge_method(
    "slerp", paper="doi:10.1145/325334.325242", scope="module", identity_on_one=True, arity=2
)
def slerp(tasks: TaskVectors, *, t: Annotated[float, Range(0, 1)] | None = None) -> Merged:
    """Turn one task vector towards another along the great circle.

    With u_1, u_2 the directions of two task vectors and Ω the angle between them: the direction
    (sin((1 − t)Ω) u_1 + sin(tΩ) u_2) / sin Ω, with the length of the mean |λ| times (1 − t)‖τ_1‖ + t‖τ_2‖. A negative
    λ turns its task vector around. Opposite vectors have no great circle: u_1 and u_2 are then mixed as 1 − t to t.

    Args:
        t: Position between the two, from 0 (the first adapter) to 1 (the second); default: |λ_2| / (|λ_1| + |λ_2|).

    Good at: two adapters, to go from one to the other.

    Source: Shoemake 1985, on the directions of task vectors; a zero one is left out. (mergekit's `slerp`, on whole
    weights, and its `nuslerp` apply the sines to vectors of their own lengths. If the lengths are equal, that is the
    same; otherwise the longer one pulls the direction.)
    """
    shares = None if t is None else torch.tensor([1 - t, t], dtype=torch.float64)
    return average_on_sphere(tasks, great_circle, shares)


def great_circle(cosines: Tensor, shares: Tensor) -> Tensor:
    """Return sin(share_t Ω) / sin Ω, the coefficients (2,) of the interpolated direction.

    Args:
        cosines: (2, 2), of the angles between the two directions.
        shares: (2,), 1 − t and t.
    """
    angle = torch.acos(cosines[0, 1])
    sine = torch.sin(angle)
    if sine <= SMALLEST_SINE:
        return shares
    return normalize_direction(cosines, torch.sin(shares * angle) / sine)
