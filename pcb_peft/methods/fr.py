"""FR-Merging: the part of FREE-Merging that adds no parameters to the model."""

from typing import Annotated

import torch
from torch import Tensor

from pcb_peft.methods.registry import merge_method
from pcb_peft.methods.spectral import merge_matrices
from pcb_peft.plugins.options import Range
from pcb_peft.tasks.task_vectors import Merged, TaskVectors

HIGHEST_FREQUENCY = 0.5**0.5  # √(½² + ½²): half a cycle per entry along both sides


@merge_method(
    "fr",
    paper="arXiv:2411.16815",
    space="dense",
    scope="module",
    identity_on_one=True,
    whole_matrix=True,
)
def fr(tasks: TaskVectors, *, cutoff: Annotated[float, Range(0, 1)] = 0.1) -> Merged:
    """Take the low frequencies out of each ΔW, seen as an image, and add up the rest.

    ΔW = Σ_t λ_t F⁻¹(H ∘ F(ΔW_t)), where F is the two-dimensional Fourier transform, and H is 0 at frequencies (η, γ)
    with √(η² + γ²) < D₀, and 1 elsewhere.

    Args:
        cutoff: D₀ as a fraction of the largest √(η² + γ²), that of the fastest oscillation along both sides.

    Good at: (IA)³ and fully fine-tuned models, says its paper.

    Measured: LoRA 79.2 (30.0).

    Source: Zheng and Wang 2025, the stage without experts. Differences: the weights are the caller's, not the tasks'
    mean entries; frequencies are in cycles per entry, so that D₀ means the same for every shape; and H is centred at
    frequency 0. (The authors' code, github.com/Zhengsh123/FREE-Merging at 36c0f41, instead keeps a disc around the
    fastest oscillation, whose radius depends on the shape: all but the slowest 0.02 % of a square matrix, a third of
    one four times as wide.)
    """
    return merge_matrices(tasks, lambda x: _merge(x, cutoff))


def _merge(x: Tensor, cutoff: float) -> Tensor:
    total = x.sum(0)  # the filter is linear: filtering the sum is adding the filtered ones
    rows, cols = total.shape
    frequency = torch.hypot(_frequencies(rows)[:, None], _frequencies(cols)[: cols // 2 + 1])
    high_pass = (frequency >= cutoff * HIGHEST_FREQUENCY).to(total.device)
    return torch.fft.irfft2(torch.fft.rfft2(total) * high_pass, s=(rows, cols))


def _frequencies(length: int) -> Tensor:
    """Frequencies of a discrete Fourier transform in cycles per entry: from 0 up to ½, then the negative ones."""
    return torch.fft.fftfreq(length, dtype=torch.float64)
