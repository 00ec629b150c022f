"""A total rank, spent on the directions of the adapters with the best benefit-to-interference score."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.deltas.delta import Delta, LowRank
from pcb_peft.deltas.rank import triplets
from pcb_peft.formats import LazyDelta
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.runtime.progress import Track

Responses: TypeAlias = Sequence[Tensor]
"""One module's responses, for each adapter t: σ_k² ‖ΔW_s v_k‖² for every adapter s and direction k of t, (T, r_t)."""

Choice: TypeAlias = Mapping[tuple[int, str], Sequence[int]]
"""From an adapter's number and a module to the numbers of the singular directions that are kept, in order."""


def select_by_net_utility(
    adapter_set: AdapterSet,
    weights: Mapping[str, Sequence[float]],
    total: int,
    track: Track,
) -> list[Adapter]:
    """Cut the adapters to the `total` directions of the highest net utility, over all modules and adapters together.

    A direction is a singular triplet σ u vᵀ of some λ_t ΔW_t. Its utility is its contribution to its own task, its
    interference its effect on the inputs of the others:

        ‖σ u vᵀ‖²_t − Σ_{s≠t} ‖σ u vᵀ‖²_s,   ‖D‖²_s = ‖D ΔW_sᵀ‖²_F / Σ_modules ‖ΔW_s ΔW_sᵀ‖²_F

    A direction whose net utility is not positive is dropped, even if the budget would allow it; a module that loses all
    its directions is not touched by the result.

    Args:
        adapter_set: The adapters; none of them is changed.
        weights: The λ_t of each module.
        total: The number of directions to keep.
        track: Shows progress.

    Source: the net utility of Amballa et al. 2026, arXiv:2609.22237: directions of every task's SVD, scored without
    data by their utility for the task less their interference with the others, the best of all layers and tasks
    together kept under a budget, before any method of merging. Its formula was not at hand; this one is ours. It is
    what a direction alone changes in Σ_s ‖ΔW_s − ΔW‖²_s, where ΔW_sᵀ ΔW_s stands for the inputs of task s as in
    WUDI-Merging, each task relative to the whole of itself.
    """
    modules = track(adapter_set.modules, "net utility")
    responses = {m: _responses(adapter_set.deltas(m), weights[m]) for m in modules}
    choice = choose(responses, total)
    return [_cut(adapter, number, choice) for number, adapter in enumerate(adapter_set.adapters)]


def choose(responses: Mapping[str, Responses], total: int) -> Choice:
    """Choose the directions of the highest net utility; of equal ones the first."""
    totals = torch.stack([_own_response(module) for module in responses.values()]).sum(0)
    share = torch.where(totals > 0, 1 / totals, 0)
    scored = [
        (-float(utility), module, adapter, direction)
        for module, by_adapter in responses.items()
        for adapter, response in enumerate(by_adapter)
        for direction, utility in enumerate(_net_utility(response * share[:, None], adapter))
        if utility > 0
    ]
    choice: dict[tuple[int, str], list[int]] = {}
    for _, module, adapter, direction in sorted(scored)[:total]:
        choice.setdefault((adapter, module), []).append(direction)
    return {key: sorted(directions) for key, directions in choice.items()}


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


def _own_response(responses: Responses) -> Tensor:
    """‖ΔW_s ΔW_sᵀ‖²_F for every adapter (T,)."""
    return torch.stack([response[adapter].sum() for adapter, response in enumerate(responses)])


def _net_utility(shares: Tensor, adapter: int) -> Tensor:
    """Utility less interference (r,), given the shares (T, r) of an adapter's directions in all tasks."""
    return 2 * shares[adapter] - shares.sum(0)


def _cut(adapter: Adapter, number: int, choice: Choice) -> Adapter:
    entries = {
        module: LazyDelta(
            LowRank,
            entry.shape,
            functools.partial(_kept, entry.load, choice[number, module]),
            rank=len(choice[number, module]),
        )
        for module, entry in adapter.modules.entries.items()
        if (number, module) in choice
    }
    return dataclasses.replace(adapter, modules=DeltaMapping(entries))


def _kept(load: Callable[[], Delta], directions: Sequence[int]) -> LowRank:
    """The delta of some of a delta's singular directions, with balanced factors."""
    delta, numbers = load(), list(directions)
    u, s, vh = triplets(delta)
    root = s[numbers].sqrt()
    factors = (root[:, None] * vh[numbers]).float(), (u[:, numbers] * root).float()
    return LowRank(*factors, layout=delta.layout)
