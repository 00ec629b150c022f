"""Adapters read beside their base model, where a merge needs W, or the names of its files."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.adapters.expert_stacks import stacked
from pcb_peft.base.architecture import FUSED
from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.delta import Dense, LowRank
from pcb_peft.deltas.layout import Layout
from pcb_peft.deltas.replacements import ReplacedParameter, Replacements
from pcb_peft.errors import BaseModelError
from pcb_peft.formats import LazyDelta, as_dense, vector_delta
from pcb_peft.spaces import Space
from pcb_peft.writing.edits import fitted
from pcb_peft.writing.folded_model import folded

ONE_BY_ONE = re.compile(r"\.experts\.(\d+\.|\w+s\.\d+$)")
"""Matches names of experts in transformers 4, and in files."""
STACKED = re.compile(r"\.experts\.\w+[^s.]\.\d+$")  # in transformers 5


def resolve_against_base(
    adapters: Sequence[Adapter],
    base: Callable[[], BaseModel] | None,
    space: Space | None = None,
) -> list[Adapter]:
    """Read adapters beside the base model, as far as the merge needs it; it is opened only then.

    It is needed
    - for deltas that depend on W;
    - for (IA)³ adapters among others, or in a space for others: they are merged as W∘(l − 1);
    - where adapters call the same experts by different names.

    Args:
        adapters: The adapters that are merged.
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
    if renamed:
        return _with_same_experts(read, base())
    return _as_stacks(read, base()) if _mixed_layers(read) else read


def _mixed_layers(adapters: Sequence[Adapter]) -> bool:
    """Return whether one adapter may name a fused layer, and another its parts."""
    leaves = {module.rpartition(".")[2] for adapter in adapters for module in adapter.modules}
    return any(fused in leaves and leaves.intersection(parts) for fused, parts in FUSED.items())


def _as_stacks(adapters: Sequence[Adapter], base: BaseModel) -> list[Adapter]:
    skeleton = base.names.skeleton
    return [
        dataclasses.replace(
            adapter, modules=DeltaMapping(stacked(adapter.modules.entries, skeleton))
        )
        for adapter in adapters
    ]


def _with_same_experts(adapters: Sequence[Adapter], base: BaseModel) -> list[Adapter]:
    """Return the adapters with their experts under names of one kind: those of the files, or stacks if these are."""
    unstacked = [unstack_experts(adapter, base) for adapter in adapters]
    if not _mixed_names(unstacked):
        return unstacked
    return _as_stacks(adapters, base)


def _mixed_kinds(adapters: Sequence[Adapter], space: Space | None) -> str:
    """Say why (IA)³ adapters must become additions to W; empty if they need not."""
    kinds = {entry.kind for adapter in adapters for entry in adapter.modules.entries.values()}
    multiply = {kind for kind in kinds if kind.multiplies}
    elsewhere = space is not None and not multiply <= set(space.accepts)
    if not multiply or (kinds == multiply and not elsewhere):
        return ""
    found = " and ".join(sorted(kind.kind_name for kind in kinds))
    return (
        f"the adapters are of kinds {found}; an (IA)³ multiplies W, and can be merged with others only as the change "
        "W∘(l − 1)"
    )


def _mixed_names(adapters: Sequence[Adapter]) -> str:
    """Say why experts must be called by the names of the files; empty if they need not."""
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
    """Return the adapter with its stacked experts under the names that they have in the files."""
    entries: dict[str, LazyDelta] = {}
    for module, entry in adapter.modules.entries.items():
        slices = base.slices(module) if STACKED.search(module) else ()
        if not slices or slices[0].index is not None:
            entries[module] = entry
            continue
        for one in slices:
            name = one.parameter.removesuffix(".weight")
            start, end = one.rows or (0, entry.shape[0])
            entries[name] = LazyDelta(
                LowRank,
                (end - start, entry.shape[1]),
                functools.partial(_load_rows, entry, start, end),
                entry.rank,
            )
    return dataclasses.replace(adapter, modules=DeltaMapping(entries))


def _load_rows(entry: LazyDelta, start: int, end: int) -> LowRank:
    lora_B, lora_A = entry.load().factors()
    return LowRank(lora_A.float(), lora_B[start:end].float())


def chain_on_base(
    adapters: Sequence[Adapter], base: Callable[[], BaseModel] | None
) -> list[Adapter]:
    """Read each adapter on top of the base model with the adapters before it in its weights.

    That is how they were trained: preferences after instructions, say. A delta that depends on W depends on that W. A
    later head takes the place of an earlier one.

    Args:
        adapters: In the order in which they were trained.
        base: The base model, if there is one.

    Raises:
        BaseModelError: A base model is needed, and none was given.
    """
    chain: list[Adapter] = []
    for adapter in adapters:
        multiplies = any(entry.kind.multiplies for entry in adapter.modules.entries.values())
        if base is None and chain and multiplies:
            raise BaseModelError(
                f"{adapter.name} multiplies W, to which {chain[-1].name} has added: give base_model (--base-model)"
            )
        link = _on_top(adapter, ChainedBase(base, tuple(chain))) if base and chain else adapter
        replaced = adapter.head.parameters
        earlier = [dataclasses.replace(one, head=one.head.without(replaced)) for one in chain]
        chain = [*earlier, link]
    return chain


def _on_top(adapter: Adapter, below: "ChainedBase") -> Adapter:
    """Return the adapter as additions to a base model that other adapters have changed."""
    read = adapter.on(below)
    if any(entry.kind.multiplies for entry in adapter.modules.entries.values()):
        read = ia3_as_additive(read, below())
    return dataclasses.replace(rescaling_as_dense(read), reopen=None)


class ChainedBase:
    """A base model with adapters in its weights, opened when it is first called for; it can be pickled."""

    def __init__(self, base: Callable[[], BaseModel], adapters: tuple[Adapter, ...]) -> None:
        self._base, self._adapters = base, adapters

    def __call__(self) -> BaseModel:
        return self._opened

    def __reduce__(self) -> tuple[type["ChainedBase"], tuple[object, ...]]:
        return ChainedBase, (self._base, self._adapters)

    @functools.cached_property
    def _opened(self) -> BaseModel:
        model = self._base()
        for adapter in self._adapters:
            replaced = {
                name: new
                for name, new in adapter.head.parameters.items()
                if model.names.in_files(name)
            }
            model = folded(adapter.modules, model, Replacements((), replaced, adapter.head.rows))
        return model


def ia3_as_additive(adapter: Adapter, base: BaseModel) -> Adapter:
    """Return the adapter with its multiplications of W as additions to it."""
    entries: dict[str, LazyDelta] = {}
    for module, entry in adapter.modules.entries.items():
        if not entry.kind.multiplies:
            entries[module] = entry
            continue
        replaced = adapter.head.parameters.get(f"{module}.weight")
        entries[module] = _product(module, entry, base, replaced)
        if base.bias_parameter(module) is not None and entry.shape[0] > 1:
            load = functools.partial(_load_bias_product, module, entry, base)
            entries[f"{module}.bias"] = LazyDelta(LowRank, (entry.shape[0], 1), load, 1)
    return dataclasses.replace(adapter, modules=DeltaMapping(entries))


def rescaling_as_dense(adapter: Adapter) -> Adapter:
    """Return the adapter with each DoRA's delta as one matrix that is added to W."""
    entries = {module: as_dense(e) for module, e in adapter.modules.entries.items()}
    return dataclasses.replace(adapter, modules=DeltaMapping(entries))


def _product(
    module: str, entry: LazyDelta, base: BaseModel, replaced: ReplacedParameter | None
) -> LazyDelta:
    """W∘(l − 1), with the W that replaces the base model's, if the adapter has one."""
    shape = replaced.shape if replaced else base.shape(module)
    layout = base.layout(module, entry.shape)
    load = functools.partial(_load_product, module, entry, base, replaced, shape, layout)
    return LazyDelta(Dense, layout.matrix_shape(shape), load)


def _load_product(
    module: str,
    entry: LazyDelta,
    base: BaseModel,
    replaced: ReplacedParameter | None,
    shape: tuple[int, ...],
    layout: Layout,
) -> Dense:
    delta = fitted(entry.load(), module, base, shape)
    values = replaced() if replaced else base.weight(module)
    return Dense(layout.matrix(delta.delta(values)), layout=layout)


def _load_bias_product(module: str, entry: LazyDelta, base: BaseModel) -> LowRank:
    """b∘(l − 1)."""
    bias = base.values(str(base.bias_parameter(module))).float()
    return vector_delta(entry.load().apply_to_bias(bias) - bias)
