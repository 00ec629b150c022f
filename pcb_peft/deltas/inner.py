"""The inner product of two deltas, from their factors where they have some."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, Dense, Diagonal, Rescaled
from pcb_peft.errors import MismatchError
from pcb_peft.runtime.threads import one_thread


@one_thread()
def inner(first: Delta, second: Delta) -> float:
    """Return ⟨ΔW₁, ΔW₂⟩, the sum over the entries of ΔW₁ ∘ ΔW₂.

    Two low-rank deltas cost (out + in) r₁ r₂ operations: ⟨B₁A₁, B₂A₂⟩ is the sum of B₁ᵀB₂ ∘ A₁A₂ᵀ. Of two (IA)³
    vectors it is ⟨l₁ − 1, l₂ − 1⟩, as their ΔW is not known without W. Everything is float64.

    Args:
        first: Of any kind.
        second: Of the same shape.

    Raises:
        MismatchError: The shapes differ, or one is an (IA)³ vector and the other a matrix.
        BaseModelError: One is a DoRA, and was read without its base model.

    Example:
        >>> import torch
        >>> from pcb_peft.deltas.delta import LowRank
        >>> delta = LowRank(lora_A=torch.ones(1, 3), lora_B=torch.ones(2, 1))
        >>> inner(delta, delta.scaled(0.5))
        3.0
    """
    if first.shape != second.shape or first.multiplies != second.multiplies:
        raise MismatchError(
            f"two adapters change one weight in ways that cannot be compared: {_in_words(first)} and "
            f"{_in_words(second)}; compare adapters of one base model, all (IA)³ or all LoRA"
        )
    if isinstance(first, Diagonal) and isinstance(second, Diagonal):
        return float(torch.dot(first.l.double() - 1, second.l.double() - 1))
    if _is_dense(first) and _is_dense(second):
        return float((first.matrix().double() * second.matrix().double()).sum())
    if _is_dense(first):
        first, second = second, first
    factors = first.factors()
    if _is_dense(second):
        return float(((factors[0].T @ second.matrix().double()) * factors[1]).sum())
    return _of_factors(factors, second.factors())


@one_thread()
def low_rank_products(merged: Delta, deltas: Mapping[str, Delta]) -> dict[str, float]:
    """Return ⟨M, ΔW⟩ for the low-rank part of a merge and of each delta; nothing for those that have no small factors.

    It is `inner` for many deltas: M's factors are computed once. Of (IA)³ vectors it is ⟨l_M − 1, l − 1⟩.
    """
    if isinstance(merged, Diagonal):
        return {name: inner(merged, delta) for name, delta in deltas.items()}
    part = merged.low_rank_part
    if isinstance(part, Dense):
        return {}
    factors = part.factors()
    return {
        name: _of_factors(factors, delta.low_rank_part.factors())
        for name, delta in deltas.items()
        if not (delta.multiplies or isinstance(delta.low_rank_part, Dense))
    }


def _of_factors(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Return ⟨B₁A₁, B₂A₂⟩, the sum over the entries of B₁ᵀB₂ ∘ A₁A₂ᵀ."""
    return float(((first[0].T @ second[0]) * (first[1] @ second[1].T)).sum())


def _is_dense(delta: Delta) -> bool:
    """True if its factors are no smaller than ΔW."""
    return isinstance(delta, Dense) or (isinstance(delta, Rescaled) and bool(delta.gain.any()))


def _in_words(delta: Delta) -> str:
    kind = "an (IA)³ vector" if isinstance(delta, Diagonal) else "a matrix"
    return f"{kind} of shape {delta.shape}"
