"""Adapters beside their base model, where merging them needs W, or the names of its files."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.delta import Dense, Diagonal, LowRank
from pcb_peft.deltas.replacements import Parameter, Replacements
from pcb_peft.errors import BaseModelError
from pcb_peft.formats import LazyDelta, as_dense, vector_delta
from pcb_peft.spaces import Space
from pcb_peft.writing.edits import fitted
from pcb_peft.writing.folded_model import folded

ONE_BY_ONE = re.compile(r"\.experts\.\d+\.")  # the experts' names in transformers 4, and in files
STACKED = re.compile(r"\.experts\.\w+\.\d+$")  # in transformers 5


def resolve_against_base(
    adapters: Sequence[Adapter],
    base: Callable[[], BaseModel] | None,
    space: Space | None = None,
) -> list[Adapter]:
    """The same adapters, read beside the base model as far as the merge needs it, which is opened only then.

    It does for deltas that depend on W; for (IA)³ among others, or in a space of others: W∘(l − 1) then; and where
    adapters call the same experts by different names.

    Args:
        adapters: Those that are merged.
        base: The base model, if there is one.
        space: The space that was asked for, if one was.

    Raises:
        BaseModelError: A base model is needed, and none was given.
    """
    entries = [entry for adapter in adapters for entry in adapter.modules.entries.values()]
    missing = next((entry.missing for entry in entries if entry.missing), "")
    mixed, renamed = _mixed_kinds(adapters, space if base else None), _mixed_names(adapters)
    if base is None and (missing or mixed or renamed):
        raise BaseModelError(f"{missing or mixed or renamed}: give base_model (--base-model)")
    if base is None:
        return list(adapters)
    read = [
        adapter.on(base) if any(e.missing for e in adapter.modules.entries.values()) else adapter
        for adapter in adapters
    ]
    if mixed:
        read = [ia3_as_additive(adapter, base()) for adapter in read]
    return [unstack_experts(adapter, base()) for adapter in read] if renamed else read


def _mixed_kinds(adapters: Sequence[Adapter], space: Space | None) -> str:
    """Why (IA)³ adapters must become additions to W, if they must."""
    kinds = {entry.kind for adapter in adapters for entry in adapter.modules.entries.values()}
    elsewhere = space is not None and Diagonal not in space.accepts
    if Diagonal not in kinds or (len(kinds) == 1 and not elsewhere):
        return ""
    found = " and ".join(sorted(kind.__name__ for kind in kinds))
    return (
        f"the adapters hold {found} deltas; an (IA)³ adapter multiplies W, and can be merged with others only as "
        "W∘(l − 1)"
    )


def _mixed_names(adapters: Sequence[Adapter]) -> str:
    """Why experts must be called by the names of the files, if they must."""
    stacked, single = (
        next((a.name for a in adapters if any(map(pattern.search, a.modules))), None)
        for pattern in (STACKED, ONE_BY_ONE)
    )
    if stacked is None or single is None:
        return ""
    return (
        f"{stacked} names experts as transformers 5 does, stacked, and {single} one by one, as version 4: which are "
        "the same is known only beside the base model"
    )


def unstack_experts(adapter: Adapter, base: BaseModel) -> Adapter:
    """The same adapter, whose stacked experts go by the names that they have in the files."""
    entries: dict[str, LazyDelta] = {}
    for module, entry in adapter.modules.entries.items():
        places = base.slices(module) if STACKED.search(module) else ()
        if not places or places[0].index is not None:
            entries[module] = entry
            continue
        for place in places:
            name = place.parameter.removesuffix(".weight")
            start, end = place.rows or (0, entry.shape[0])
            entries[name] = LazyDelta(
                LowRank,
                (end - start, entry.shape[1]),
                functools.partial(_rows, entry, start, end),
                entry.rank,
            )
    return dataclasses.replace(adapter, modules=DeltaMapping(entries))


def _rows(entry: LazyDelta, start: int, end: int) -> LowRank:
    delta = entry.load()
    lora_B, lora_A = delta.factors()
    return LowRank(lora_A.float(), lora_B[start:end].float())


def chain_on_base(
    adapters: Sequence[Adapter], base: Callable[[], BaseModel] | None
) -> list[Adapter]:
    """The same adapters, each read on top of the base model with those before it in its weights.

    So they were trained: an adapter, then another one (preferences after instructions) on the model that the first had
    changed. Where a delta depends on W, that is the W it depends on. A later head takes the place of an earlier one.

    Args:
        adapters: In the order in which they were trained.
        base: The base model, if there is one.

    Raises:
        BaseModelError: A base model is needed, and none was given.
    """
    chain: list[Adapter] = []
    for adapter in adapters:
        below = _with_all_of(tuple(chain), base)
        kinds = {entry.kind for entry in adapter.modules.entries.values()}
        if below is None and chain and Diagonal in kinds:
            raise BaseModelError(
                f"{adapter.name} multiplies W, on which {chain[-1].name} has added: give base_model (--base-model)"
            )
        if below is not None and chain:
            read = adapter.on(below)
            read = ia3_as_additive(read, below()) if Diagonal in kinds else read
            adapter = dataclasses.replace(rescaling_as_dense(read), reopen=None)
        names = adapter.head.parameters
        chain = [dataclasses.replace(a, head=a.head.without(names)) for a in chain] + [adapter]
    return chain


def _with_all_of(
    adapters: Sequence[Adapter], base: Callable[[], BaseModel] | None
) -> Callable[[], BaseModel] | None:
    """The base model with all of these in its weights, opened when it is asked for."""
    if base is None or not adapters:
        return base

    @functools.cache
    def opened() -> BaseModel:
        model = base()
        for adapter in adapters:
            held = {
                name: new
                for name, new in adapter.head.parameters.items()
                if model.names.in_files(name)
            }
            model = folded(adapter.modules, model, Replacements((), held, adapter.head.rows))
        return model

    return opened


def ia3_as_additive(adapter: Adapter, base: BaseModel) -> Adapter:
    """The same adapter, whose multiplications of W are additions to it."""
    entries: dict[str, LazyDelta] = {}
    for module, entry in adapter.modules.entries.items():
        if entry.kind is not Diagonal:
            entries[module] = entry
            continue
        own = adapter.head.parameters.get(f"{module}.weight")
        entries[module] = _product(module, entry, base, own)
        if base.bias_parameter(module) is not None and entry.shape[0] > 1:
            entries[f"{module}.bias"] = _bias_product(module, entry, base)
    return dataclasses.replace(adapter, modules=DeltaMapping(entries))


def rescaling_as_dense(adapter: Adapter) -> Adapter:
    """The same adapter, of which what rescales W is one matrix that is added to it."""
    entries = {module: as_dense(e) for module, e in adapter.modules.entries.items()}
    return dataclasses.replace(adapter, modules=DeltaMapping(entries))


def _product(module: str, entry: LazyDelta, base: BaseModel, own: Parameter | None) -> LazyDelta:
    """W∘(l − 1), with the W that the adapter brings along, if it does."""
    weight = own.shape if own else base.shape(module)
    layout = base.layout(module, entry.shape)

    def load() -> Dense:
        delta = fitted(entry.load(), module, base, weight)
        values = own() if own else base.weight(module)
        return Dense(layout.matrix(delta.delta(values)), layout=layout)

    return LazyDelta(Dense, layout.matrix_shape(weight), load)


def _bias_product(module: str, entry: LazyDelta, base: BaseModel) -> LazyDelta:
    """b∘(l − 1)."""

    def load() -> LowRank:
        bias = base.tensor(str(base.bias_parameter(module))).float()
        return vector_delta(entry.load().apply_to_bias(bias) - bias)

    return LazyDelta(LowRank, (entry.shape[0], 1), load, 1)
