"""The inner product of two deltas, from their factors where they have some."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, Dense, Diagonal, LowRank, Rescaled
from pcb_peft.deltas.linalg import inner_product
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
    return inner_product(factors, second.factors())


class Overlap(NamedTuple):
    """One adapter's delta beside the merged one.

    Attributes:
        norm: ‖ΔW‖ of its low-rank part; of an (IA)³ vector ‖l − 1‖.
        product: ⟨M, ΔW⟩ of the low-rank parts; of (IA)³ vectors ⟨l_M − 1, l − 1⟩. None where one has no small factors.
    """

    norm: float
    product: float | None


@one_thread()
def overlaps(merged: Delta, deltas: Mapping[str, Delta]) -> dict[str, Overlap]:
    """Return the norm of each delta and its inner product with a merge.

    It is `Delta.norm` and `inner`, but the long products of `inner` are float32, which take half the time: this is done
    for every module of a merge. The product is right to some 1e-6 of ‖M‖ ‖lora_B‖ ‖lora_A‖.
    """
    if isinstance(merged, Diagonal):
        return {name: Overlap(one.norm(), inner(merged, one)) for name, one in deltas.items()}
    part = merged.low_rank_part
    merged_factors = None if isinstance(part, Dense) else _float32_factors(part)
    result: dict[str, Overlap] = {}
    for name, delta in deltas.items():
        own, product = delta.low_rank_part, None
        if not (merged_factors is None or delta.multiplies or isinstance(own, Dense)):
            product = inner_product(merged_factors, _float32_factors(own))
        result[name] = Overlap(own.norm(), product)
    return result


def _float32_factors(delta: Delta) -> tuple[Tensor, Tensor]:
    """Return two factors, float32, whose product is ΔW; a scaling other than 1 is part of the first."""
    if isinstance(delta, LowRank):
        lora_B = delta.lora_B.float()
        return lora_B if delta.scaling == 1 else lora_B * delta.scaling, delta.lora_A.float()
    left, right = delta.factors()
    return left.float(), right.float()


def _is_dense(delta: Delta) -> bool:
    """True if its factors are no smaller than ΔW."""
    return isinstance(delta, Dense) or (isinstance(delta, Rescaled) and bool(delta.gain.any()))


def _in_words(delta: Delta) -> str:
    kind = "an (IA)³ vector" if isinstance(delta, Diagonal) else "a matrix"
    return f"{kind} of shape {delta.shape}"
