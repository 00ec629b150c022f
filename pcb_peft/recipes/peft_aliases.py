"""PEFT's names for merges (``cat``, ``svd``, ``ties_svd`` …), in terms of this package.

They are computed on ΔW, as the name promises; PEFT computes some of them on the factors.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.deltas.rank_choice import LOSSLESS, FixedRank
from pcb_peft.recipes.fields import a_name
from pcb_peft.recipes.recipe import Recipe

LARGEST = "largest"  # the highest rank of an adapter: PEFT's svd_rank=None

DENSE = {"space": "dense", "scope": "module"}  # PEFT trims and drops each weight by itself

UNWEIGHTED = {"elect": "unweighted"}  # PEFT elects signs before it weighs the adapters

PEFT_ALIASES: dict[str, dict[str, Any]] = {
    "cat": {"method": "linear", "space": "core"},
    "svd": {"method": "linear", "space": "core", "rank": LARGEST},
    "ties_svd": {"method": "ties", **DENSE, "rank": LARGEST, "options": UNWEIGHTED},
    "dare_linear_svd": {"method": "dare_linear", **DENSE, "rank": LARGEST},
    "dare_ties_svd": {"method": "dare_ties", **DENSE, "rank": LARGEST, "options": UNWEIGHTED},
    "magnitude_prune_svd": {"method": "magnitude_prune", **DENSE, "rank": LARGEST},
}
"""PEFT's combination types that are not the name of a method here. Without ``_svd``, PEFT's elementwise types work on
the factors; here they are methods like any other, and work where they are told to."""


def method_of(name: str) -> str:
    """Return the method behind one of PEFT's names; any other name as it is.

    Raises:
        OptionError: It is no name.
    """
    a_name("method", name)
    return PEFT_ALIASES.get(name, {}).get("method", name)


def resolve_peft_alias(recipe: Recipe, adapters: Sequence[Adapter]) -> Recipe:
    """Replace PEFT's name for a method by its meaning; what the recipe sets itself stays."""
    meaning = dict(PEFT_ALIASES.get(recipe.method, {}))
    if meaning.get("rank") == LARGEST:
        entries = (entry for adapter in adapters for entry in adapter.modules.entries.values())
        ranks = [entry.rank for entry in entries if entry.rank]
        meaning["rank"] = FixedRank(max(ranks)) if ranks else LOSSLESS
    meaning["options"] = {**meaning.get("options", {}), **recipe.options}
    given = {
        "space": recipe.space != "auto",
        "scope": recipe.scope != "auto",
        "rank": recipe.rank != LOSSLESS,
    }
    return dataclasses.replace(
        recipe, **{name: value for name, value in meaning.items() if not given.get(name)}
    )
