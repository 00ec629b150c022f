"""All that is decided before a merge, or its dry run: in one order, once, from files' headers where that is enough."""

import dataclasses
from collections.abc import Callable, Sequence

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.companions import Companions
from pcb_peft.adapters.loading import load_adapters
from pcb_peft.adapters.names import named_apart
from pcb_peft.adapters.source import IN_MEMORY, Source
from pcb_peft.base.model import BaseModel, lazy_base
from pcb_peft.data.statistics_file import TaskStatistics, check_statistics, open_statistics
from pcb_peft.errors import ProcessError
from pcb_peft.images.names import ImageLora
from pcb_peft.merging.companions import merge_companions
from pcb_peft.merging.compatibility import (
    AdapterSet,
    CommonBase,
    common_base,
)
from pcb_peft.merging.dora_or_lora import fall_back_to_lora
from pcb_peft.merging.heads import MergedHeads, merge_heads
from pcb_peft.merging.image_names import (
    checked_image,
    format_notes,
    refuse_different_embeddings,
)
from pcb_peft.merging.one_name import under_one_name
from pcb_peft.merging.plan import Plan, named_method, plan
from pcb_peft.merging.resolve_base import chain_on_base, resolve_against_base
from pcb_peft.merging.untrained import without_untrained_copies
from pcb_peft.methods import MergeMethod
from pcb_peft.recipes.peft_aliases import resolve_peft_alias
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.runtime.processes import current
from pcb_peft.spaces import get_space
from pcb_peft.version import __version__


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A merge that is ready to run.

    Attributes:
        recipe: The recipe with every default and every hash written out.
        adapter_set: The adapters, resolved and checked against each other.
        base: The base model, if one was given.
        common: The base model that the adapters name.
        plan: How each module is merged.
        statistics: One per adapter, for methods that need them.
        heads: The parameters that the result replaces.
        companions: The files beside the adapters that the result gets.
        image: What is known about LoRAs of an image model; None for adapters of PEFT.
        notes: What was decided, for the report.
    """

    recipe: Recipe
    adapter_set: AdapterSet
    base: Callable[[], BaseModel] | None
    common: CommonBase
    plan: Plan
    statistics: Sequence[TaskStatistics]
    heads: MergedHeads
    companions: Companions
    image: ImageLora | None
    notes: Sequence[str]

    @property
    def format(self) -> str | None:
        """Format of the result, for the recipe; None for an adapter of PEFT if nobody asked for it."""
        return self.recipe.format or (None if self.image is None else self.image.dialect)


def prepare(
    recipe: Recipe,
    adapters: Sequence[Adapter] | None = None,
    method: MergeMethod | None = None,
    statistics: Sequence[TaskStatistics] | None = None,
    *,
    headers_only: bool = False,
) -> Prepared:
    """Load what a recipe names, check that it fits together, and plan the merge.

    Args:
        recipe: The recipe.
        adapters: The recipe's adapters, if they are loaded already.
        method: The recipe's method, if it is not one that has a name.
        statistics: The recipe's statistics, if they are open already.
        headers_only: Read no tensors but token rows: files are not hashed, and heads of several adapters count as
            different, as in a dry run.

    Raises:
        PcbPeftError: The merge cannot be made.
    """
    chosen = method or named_method(recipe.method)
    base = lazy_base(recipe.base_model, dequantize=recipe.dequantize)
    given = adapters or load_adapters(recipe.adapters, base_model=base, hashed=not headers_only)
    renamed, name_notes = _under_one_name(named_apart(given), base)
    resolved = _resolved(renamed, recipe, base)
    fitting, fitting_notes = _fitting(resolved, base, headers_only=headers_only)
    opened = _opened_statistics(statistics, recipe, fitting, hashed=not headers_only)
    image = checked_image(recipe.format, fitting)
    adapter_set, common = AdapterSet(fitting), common_base(fitting, recipe.base_model)
    complete = dataclasses.replace(
        resolve_peft_alias(recipe, fitting),
        adapters=sources_of(fitting),
        statistics=sources_of(opened),
    )
    planned = plan(complete, chosen, adapter_set, opened[0].kind if opened else None, base)
    heads = _heads(fitting, planned.recipe, headers_only=headers_only)
    companions, companion_notes = merge_companions(fitting, recipe.companions)
    return Prepared(
        recipe=planned.recipe,
        adapter_set=adapter_set,
        base=base,
        common=common,
        plan=planned,
        statistics=opened,
        heads=heads,
        companions=companions,
        image=image,
        notes=[
            *planned.notes,
            *heads.notes,
            *companion_notes,
            *_version_notes(recipe),
            *name_notes,
            *fitting_notes,
            *common.notes,
            *format_notes(fitting, image),
        ],
    )


def _opened_statistics(
    given: Sequence[TaskStatistics] | None,
    recipe: Recipe,
    adapters: Sequence[Adapter],
    *,
    hashed: bool,
) -> Sequence[TaskStatistics]:
    """The statistics that were given, or those that the recipe names, checked against the adapters."""
    opened = given or [open_statistics(source) for source in recipe.statistics]
    if opened:
        check_statistics(opened, adapters, hashed=hashed)
    return opened


def sources_of(opened: Sequence[Adapter] | Sequence[TaskStatistics]) -> tuple[Source, ...]:
    """The files of adapters or statistics; those that are in no file have a name only."""
    return tuple(one.source or Source(f"{IN_MEMORY}{one.name}") for one in opened)


def _under_one_name(
    adapters: Sequence[Adapter], base: Callable[[], BaseModel] | None
) -> tuple[list[Adapter], list[str]]:
    """The adapters, which are the same in all processes, with one name for every module."""
    _refuse_different_files(adapters)
    return under_one_name(adapters, base)


def _resolved(
    adapters: Sequence[Adapter], recipe: Recipe, base: Callable[[], BaseModel] | None
) -> list[Adapter]:
    """The adapters, read beside the base model where that is needed."""
    chained = chain_on_base(adapters, base) if recipe.chain else adapters
    asked = None if recipe.space == "auto" else get_space(recipe.space)
    return resolve_against_base(chained, base, asked)


def _heads(adapters: Sequence[Adapter], recipe: Recipe, *, headers_only: bool) -> MergedHeads:
    """The heads of the result: what it replaces, and what is kept beside it."""
    compare = not headers_only
    heads = merge_heads(adapters, recipe.weights, recipe.heads, chosen=recipe.head, compare=compare)
    if compare:
        refuse_different_embeddings(heads.kept)
    return heads


def _fitting(
    adapters: Sequence[Adapter], base: Callable[[], BaseModel] | None, *, headers_only: bool
) -> tuple[list[Adapter], list[str]]:
    """The adapters as the merge takes them, and notes on what was changed for that."""
    loras, lora_notes = fall_back_to_lora(adapters, base)
    trained, copy_notes = without_untrained_copies(loras, None if headers_only else base)
    return trained, [*lora_notes, *copy_notes]


def _refuse_different_files(adapters: Sequence[Adapter]) -> None:
    """Raises ProcessError where processes do not read the same adapters."""
    own = [(a.name, a.source and (a.source.sha256, a.source.config_sha256)) for a in adapters]
    first, *others = current().all_gather(own)
    for rank, theirs in enumerate(others, 1):
        if theirs != first:
            names = ", ".join(sorted({name for name, _ in set(first) ^ set(theirs)}))
            raise ProcessError(
                f"processes 0 and {rank} read different files under the name of {names}; let all processes see the "
                "same adapters"
            )


def _version_notes(recipe: Recipe) -> list[str]:
    """A note on a recipe that was completed by another version of this package."""
    if recipe.version in (None, __version__):
        return []
    return [
        f"the recipe was written by pcb_peft {recipe.version}, and this is {__version__}: bytes may differ"
    ]
