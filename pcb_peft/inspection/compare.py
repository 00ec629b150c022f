"""Adapters side by side, before they are merged: do they fit, who dominates, what do they share."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import AdapterLike, load_adapters
from pcb_peft.adapters.names import named_apart
from pcb_peft.base.model import lazy_base
from pcb_peft.errors import OptionError, PcbPeftError
from pcb_peft.inspection.advice import SAME, SHARED_INITIALISATION, advice
from pcb_peft.inspection.comparison import Comparison
from pcb_peft.inspection.pairs import Geometry, geometry_of
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.merging.prepare import prepare, sources_of
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.runtime.progress import tracker

BYTES_PER_VALUE = 4  # of float32


def compare_adapters(
    adapters: Sequence[AdapterLike],
    base_model: str | Path | None = None,
    *,
    dequantize: bool = False,
    progress: bool | None = None,
) -> Comparison:
    """Compare adapters before they are merged: whether they fit, who dominates, what they share.

    Everything comes from the adapters' files. None of it tells which task a merge will lose: measure that with
    `evaluate`.

    Args:
        adapters: Two or more: directories, hub ids, (PeftModel, adapter name), or loaded adapters.
        base_model: Path or hub id of the base model, for kinds that need W, and to look the modules up in it.
        dequantize: Take a quantised base model; its weights are computed from their codes.
        progress: Show a bar; default: on a terminal.

    Returns:
        The comparison, to print or to read. Adapters that cannot be merged are no error: `problems` says why not.

    Raises:
        OptionError: Fewer than two adapters are given.
        AdapterError: One of them cannot be read.

    Example:
        >>> from pcb_peft import compare_adapters
        >>> compare_adapters(["math-lora", "code-lora"]).problems
        ()
    """
    if len(adapters) < 2:
        raise OptionError("compare takes two or more adapters; pcb-peft inspect looks at one")
    base = lazy_base(base_model, dequantize=dequantize)
    opened = named_apart(load_adapters(adapters, base_model=base))
    names = tuple(adapter.name for adapter in opened)
    try:
        recipe = Recipe.parse(
            adapters=sources_of(opened), base_model=base_model, dequantize=dequantize
        )
        prepared = prepare(recipe, opened)
    except PcbPeftError as error:
        return Comparison(names, problems=(str(error),))
    geometry = geometry_of(prepared.adapter_set.adapters, tracker(progress))
    rank, size = _rank_and_size(prepared.adapter_set)
    comparison = Comparison(
        names,
        geometry,
        merged_rank=rank,
        merged_bytes=size,
        notes=tuple(prepared.notes),
        duplicates=_duplicates(opened, geometry),
        shared_initialisation=bool((geometry.initial.triu(1) > SHARED_INITIALISATION).any()),
    )
    return dataclasses.replace(comparison, advice=tuple(advice(comparison)))


def _rank_and_size(together: AdapterSet) -> tuple[int | None, int]:
    """Return the rank of a merge without loss, and the bytes of its tensors; no rank for (IA)³ vectors."""
    entries = together.modules.values()
    if any(entry.kind.multiplies for entry in entries):
        return None, BYTES_PER_VALUE * sum(max(entry.shape) for entry in entries)
    rank, values = together.lossless_size(in_parts=True)
    return rank, BYTES_PER_VALUE * values


def _duplicates(adapters: Sequence[Adapter], geometry: Geometry) -> tuple[tuple[str, str], ...]:
    """Return pairs of adapters that are the same change, or one that is a multiple of the other."""
    return tuple(
        (adapters[i].name, adapters[j].name)
        for i, j in itertools.combinations(range(len(adapters)), 2)
        if abs(float(geometry.cosines[i, j])) > SAME
    )
