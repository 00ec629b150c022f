"""Advice on a comparison: each sentence says what to do, and why."""

import itertools

from pcb_peft.inspection.comparison import Comparison
from pcb_peft.inspection.pairs import Geometry
from pcb_peft.runtime.shown import some_of

SHARED_INITIALISATION = 0.8
"""Median principal cosine of the rows of lora_A above which two adapters were trained from the same lora_A."""
SAME = 1 - 1e-4
"""Cosine of ΔW above which two adapters make the same change, or a multiple of it."""
DOMINANT = 3
"""Ratio of norms above which one adapter dominates a sum."""


def advice(comparison: Comparison) -> list[str]:
    """Return sentences on what to do about what was found; none where nothing was."""
    if comparison.geometry is None:
        return []
    return [
        *_on_disjoint_modules(comparison.geometry),
        *_on_duplicates(comparison),
        *_on_dominance(comparison, comparison.geometry),
        *_on_initialisation(comparison, comparison.geometry),
    ]


def _on_disjoint_modules(geometry: Geometry) -> list[str]:
    if geometry.has_common_modules:
        return []
    return [
        "No two of them change the same module: nothing competes, and the merge holds each as it is, times its weight; "
        "if that is a surprise, look at their targets and their base models with pcb-peft inspect."
    ]


def _on_duplicates(comparison: Comparison) -> list[str]:
    return [
        f"{first} and {second} make the same change, or a multiple of it: a merge counts it twice; leave one out."
        for first, second in comparison.duplicates
    ]


def _on_dominance(comparison: Comparison, geometry: Geometry) -> list[str]:
    norms = dict(zip(comparison.names, geometry.norms, strict=True))
    strongest, weakest = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    if norms[weakest] == 0:
        return [f"{weakest} changes nothing: was it trained?"]
    ratio = norms[strongest] / norms[weakest]
    if ratio < DOMINANT:
        return []
    return [
        f"{strongest} is {ratio:.1f} times as strong as {weakest}: a sum of both is mostly {strongest}. flat, the "
        "default for LoRA, makes all directions equally strong; for other methods set --weights, and measure with "
        "pcb-peft evaluate."
    ]


def _on_initialisation(comparison: Comparison, geometry: Geometry) -> list[str]:
    if not comparison.shared_initialisation:
        return []
    pairs = [
        f"{comparison.names[i]} and {comparison.names[j]}"
        for i, j in itertools.combinations(range(len(comparison.names)), 2)
        if geometry.initial[i, j] > SHARED_INITIALISATION
    ]
    largest = float(geometry.initial.nan_to_num(0).triu(1).max())
    shown = some_of(pairs, between="; ")
    return [
        f"{shown} have rows of lora_A in common, as if trained from the same one, or one merged from the other "
        f"(median cosine up to {largest:.2f}): methods that solve linear systems (regmean, wudi) need a "
        "ridge there, sums and sparsifying methods do not care (Pathak et al. 2026)."
    ]
