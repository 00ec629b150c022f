"""The metric of a merge that names neither a method nor a metric, and has the base model at hand."""

import dataclasses
from collections.abc import Callable

from pcb_peft.adapters.source import Source
from pcb_peft.base.canonical import AUTO_CLASSES
from pcb_peft.base.files import bytes_of
from pcb_peft.base.model import BaseModel
from pcb_peft.data.metric import RANDOM
from pcb_peft.data.moments import is_linear
from pcb_peft.deltas.delta import LowRank
from pcb_peft.errors import BaseModelError
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.runtime.units import format_size

MOST_BYTES = 16 << 30
"""Weights of the largest base model that is run without being asked for; it has to fit into memory."""


def with_default_metric(
    recipe: Recipe, adapter_set: AdapterSet, base: Callable[[], BaseModel] | None
) -> tuple[Recipe, list[str]]:
    """Let a merge by the default method use what its base model tells.

    The metric of random tokens keeps more of adapters that disturb each other, and as much of others
    (``docs/methods.md``).

    Args:
        recipe: One that names no method.
        adapter_set: Its adapters.
        base: Its base model, if it names one.

    Returns:
        The recipe, with ``metric="random"`` where that can be measured; and a note for the report, which says so, or
        why not.
    """
    if recipe.metric is not None or recipe.statistics or base is None:
        return recipe, []
    if not adapter_set.kinds <= {LowRank}:
        return recipe, []
    if obstacle := _obstacle(adapter_set, base):
        return recipe, [f"adapters are compared without metric='random': {obstacle}"]
    note = (
        "no method is named, and the base model is given: adapters are compared by what its layers see of random "
        "tokens (metric='random': one pass over the model, kept in the cache); name the method (--method flat) to "
        "leave that out"
    )
    return dataclasses.replace(recipe, metric=Source(RANDOM)), [note]


def _obstacle(adapter_set: AdapterSet, base: Callable[[], BaseModel]) -> str:
    """The reason why a base model is not run on random tokens; empty if there is none."""
    try:
        opened = base()
    except BaseModelError:
        return "the base model is not on this machine"
    task_types = {adapter.task_type for adapter in adapter_set.adapters}
    if not opened.names.skeleton.reads_tokens or not task_types <= AUTO_CLASSES.keys():
        return "the base model does not read texts, or the adapters do not name their task type"
    if opened.quantised:
        return "the base model is quantised"
    if (size := bytes_of(opened.tensors)) > MOST_BYTES:
        return (
            f"the base model has {format_size(size)} of weights, and more than {format_size(MOST_BYTES)} are read only "
            "if you ask for that metric"
        )
    if not any(is_linear(opened.layer(module)) for module in adapter_set.modules):
        return "the adapters change no linear layer"
    return ""
