"""A total rank, given to the directions of the adapters that help their own task more than they disturb the others."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter, DeltaMapping
from pcb_peft.deltas.delta import Delta, LowRank
from pcb_peft.deltas.rank import triplets
from pcb_peft.formats import LazyDelta
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.runtime.progress import Track

Responses: TypeAlias = Sequence[Tensor]
"""Of one module, for each adapter t: σ_k² ‖ΔW_s v_k‖² for every adapter s and direction k of t, (T, r_t)."""

Choice: TypeAlias = Mapping[tuple[int, str], Sequence[int]]
"""From the number of an adapter and a module to those of its singular directions, in order, that are kept."""


def select_by_net_utility(
    alignment: AdapterSet,
    weights: Callable[[str], Sequence[float]],
    total: int,
    track: Track,
) -> list[Adapter]:
    """The adapters, cut to the `total` directions of the highest net utility, over all modules and adapters together.

    A direction is a singular triplet σ u vᵀ of some λ_t ΔW_t. Its utility is what it contributes to its own task, its
    interference what it does to the inputs of the others:

        ‖σ u vᵀ‖²_t − Σ_{s≠t} ‖σ u vᵀ‖²_s,   ‖D‖²_s = ‖D ΔW_sᵀ‖²_F / Σ_modules ‖ΔW_s ΔW_sᵀ‖²_F

    Where that is not positive the direction is dropped, even if the budget has room for it; a module in which nothing
    is left is not touched by the result.

    Args:
        alignment: The adapters; none of them is changed.
        weights: From a module to the λ_t there.
        total: How many directions to keep.
        track: Shows progress.

    Source: the net utility of Amballa et al. 2026, arXiv:2609.22237: directions of every task's SVD, scored without
    data by their utility for the task less their interference with the others, the best of all layers and tasks
    together kept under a budget, before any method of merging. Its formula was not at hand; this one is ours. It is
    what a direction alone changes in Σ_s ‖ΔW_s − ΔW‖²_s, where ΔW_sᵀ ΔW_s stands for the inputs of task s as in
    WUDI-Merging, each task relative to the whole of itself.
    """
    modules = track(alignment.modules, "net utility")
    responses = {m: _responses(alignment.deltas(m), weights(m)) for m in modules}
    chosen = choose(responses, total)
    return [_cut(adapter, number, chosen) for number, adapter in enumerate(alignment.adapters)]


def choose(responses: Mapping[str, Responses], total: int) -> Choice:
    """The directions of the highest net utility, of equal ones the first."""
    whole = torch.stack([_own(some) for some in responses.values()]).sum(0)
    share = torch.where(whole > 0, 1 / whole, 0)
    scored = [
        (-float(utility), module, adapter, direction)
        for module, some in responses.items()
        for adapter, response in enumerate(some)
        for direction, utility in enumerate(_net(response * share[:, None], adapter))
        if utility > 0
    ]
    chosen: dict[tuple[int, str], list[int]] = {}
    for _, module, adapter, direction in sorted(scored)[:total]:
        chosen.setdefault((adapter, module), []).append(direction)
    return {key: sorted(directions) for key, directions in chosen.items()}


def _responses(deltas: Sequence[Delta], weights: Sequence[float]) -> Responses:
    spectra = [triplets(delta) for delta in deltas]
    scaled = [s * abs(weight) for (_, s, _), weight in zip(spectra, weights, strict=True)]
    inputs = [
        s[:, None] * vh for s, (_, _, vh) in zip(scaled, spectra, strict=True)
    ]  # ‖ΣVᵀv‖ = ‖ΔW v‖
    return [
        torch.stack([s.square() * (other @ vh.T).square().sum(0) for other in inputs])
        for s, (_, _, vh) in zip(scaled, spectra, strict=True)
    ]


def _own(responses: Responses) -> Tensor:
    """‖ΔW_s ΔW_sᵀ‖²_F for every adapter (T,)."""
    return torch.stack([response[adapter].sum() for adapter, response in enumerate(responses)])


def _net(shares: Tensor, adapter: int) -> Tensor:
    """Utility less interference (r,), of the shares (T, r) that the directions of an adapter have in all tasks."""
    return 2 * shares[adapter] - shares.sum(0)


def _cut(adapter: Adapter, number: int, chosen: Choice) -> Adapter:
    entries = {
        module: LazyDelta(
            LowRank,
            entry.shape,
            functools.partial(_kept, entry.load, chosen[number, module]),
            rank=len(chosen[number, module]),
        )
        for module, entry in adapter.modules.entries.items()
        if (number, module) in chosen
    }
    return dataclasses.replace(adapter, modules=DeltaMapping(entries))


def _kept(load: Callable[[], Delta], directions: Sequence[int]) -> LowRank:
    """Some of the singular directions of a delta, with balanced factors."""
    delta, some = load(), list(directions)
    u, s, vh = triplets(delta)
    root = s[some].sqrt()
    factors = (root[:, None] * vh[some]).float(), (u[:, some] * root).float()
    return LowRank(*factors, layout=delta.layout)
