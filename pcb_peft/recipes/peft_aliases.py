"""PEFT's names for merges, as this package computes them: in the space of deltas, as the name promises."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.recipes.recipe import Recipe

LARGEST = "largest"  # the rank of the adapter that has the highest, as PEFT's svd_rank=None

DENSE = {"space": "dense", "scope": "module"}  # PEFT trims and drops each weight by itself

PEFT_ALIASES: dict[str, dict[str, Any]] = {
    "cat": {"method": "linear", "space": "core"},
    "svd": {"method": "linear", "space": "core", "rank": LARGEST},
    "ties_svd": {"method": "ties", **DENSE, "rank": LARGEST},
    "dare_linear_svd": {"method": "dare_linear", **DENSE, "rank": LARGEST},
    "dare_ties_svd": {"method": "dare_ties", **DENSE, "rank": LARGEST},
    "magnitude_prune_svd": {"method": "magnitude_prune", **DENSE, "rank": LARGEST},
}
"""PEFT's combination types that are not the name of a method here. Without ``_svd``, PEFT's elementwise types work on
the factors; here they are methods like any other, and work where they are told to."""


def method_of(name: str) -> str:
    """The method behind one of PEFT's names; any other name as it is."""
    return PEFT_ALIASES.get(name, {}).get("method", name)


def resolve_peft_alias(recipe: Recipe, adapters: Sequence[Adapter]) -> Recipe:
    """The recipe with PEFT's name for a method replaced by what it stands for; what the recipe says itself stands."""
    meaning = dict(PEFT_ALIASES.get(recipe.method, {}))
    if meaning.get("rank") == LARGEST:
        ranks = [
            entry.rank or 0 for adapter in adapters for entry in adapter.modules.entries.values()
        ]
        meaning["rank"] = max(ranks, default=0) or None
    said = {
        "space": recipe.space != "auto",
        "scope": recipe.scope != "auto",
        "rank": recipe.rank is not None,
    }
    return dataclasses.replace(
        recipe, **{name: value for name, value in meaning.items() if not said.get(name)}
    )
