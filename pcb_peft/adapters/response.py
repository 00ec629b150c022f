"""The response of a merge: its strength along each adapter that went into it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.deltas.inner import inner


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """c = ⟨M, ΔW⟩ / ‖ΔW‖² of a merge M along one adapter: 1 if M holds the adapter in full, 0 if nothing of it.

    Attributes:
        total: c, with the inner products summed over all modules.
        modules: c of each module that the adapter changes.
    """

    total: float
    modules: dict[str, float]


def responses(merged: Adapter, adapters: Sequence[Adapter]) -> dict[str, Response]:
    """Return the response of a merge along each adapter, by the adapter's name.

    It says how strong the merge is, not how good: where the mean over the adapters is far below 0.5, a larger common
    weight is worth a try; it does not tell which task is lost.

    Args:
        merged: The merge, or any adapter of the same base model.
        adapters: Those that went into it.

    Raises:
        MismatchError: A module has other shapes in two of them, or is a LoRA here and an (IA)³ there.
        BaseModelError: A DoRA was read without its base model.

    Example:
        >>> merged = merge_adapters(["math-lora", "code-lora"])
        >>> responses(merged, [load_adapter("math-lora"), load_adapter("code-lora")])["math-lora"].total
    """
    return {adapter.name: _response(merged, adapter) for adapter in adapters}


def _response(merged: Adapter, adapter: Adapter) -> Response:
    products: dict[str, float] = {}
    squares: dict[str, float] = {}
    for module, delta in adapter.modules.items():
        squares[module] = delta.norm() ** 2
        products[module] = inner(merged.modules[module], delta) if module in merged.modules else 0.0
    return Response(
        _ratio(math.fsum(products.values()), math.fsum(squares.values())),
        _ratios(products, squares),
    )


def _ratios(products: Mapping[str, float], squares: Mapping[str, float]) -> dict[str, float]:
    return {module: _ratio(products[module], squares[module]) for module in products}


def _ratio(product: float, square: float) -> float:
    """Return the quotient; 0 for an adapter that changes nothing."""
    return product / square if square else 0.0
