"""The adapters that a merge was made of, with their weights."""

from collections.abc import Callable
from pathlib import Path

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapters
from pcb_peft.base.model import BaseModel
from pcb_peft.errors import PcbPeftError
from pcb_peft.merging.result import MergedAdapter
from pcb_peft.recipes.recipe import FILE_NAME, Recipe, read_recipe
from pcb_peft.runtime.shown import shown


def weighted_sources(adapter: Adapter, base: Callable[[], BaseModel]) -> list[Adapter] | str:
    """Return the adapters that a merge was made of, each times its weight: their sum is the plain merge.

    Args:
        adapter: A merge in memory, or one that was saved with its recipe.
        base: The base model.

    Returns:
        The adapters. Where a merge has no such sum, or its sources are gone, changed or unreadable: why, in words.
        Empty words for an adapter that is no merge.
    """
    try:
        recipe = _recipe(adapter)
        if recipe is None:
            return ""
        weights = [weight for weight in recipe.weights if isinstance(weight, float)]
        if recipe.overrides or len(weights) < len(recipe.adapters):
            return "weights differ between modules"
        loaded = load_adapters(recipe.adapters, base_model=base)
    except PcbPeftError as error:
        return shown(error)
    return [one.scaled(weight * recipe.scale) for one, weight in zip(loaded, weights, strict=True)]


def _recipe(adapter: Adapter) -> Recipe | None:
    if isinstance(adapter, MergedAdapter):
        return adapter.recipe
    if adapter.source is None:
        return None
    path = Path(adapter.source.directory) / FILE_NAME
    return read_recipe(path) if path.is_file() else None
