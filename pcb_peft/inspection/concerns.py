"""Things that look wrong in one adapter, in words."""

from collections.abc import Callable, Sequence
from statistics import median

from pcb_peft.inspection.facts import Inspection
from pcb_peft.runtime.shown import some_of

FEWEST = 3
"""Modules of a target that tell what is usual."""
DEAD = 1e-4
"""A module whose norm is a smaller part of the median is called dead."""
EXTREME = 20
"""A module whose norm is more times the median of its target is called extreme."""
UNUSUAL_SCALING = (0.1, 8)
"""Scalings below and above are rare; most adapters have 1 or 2."""


def concerns(facts: Inspection) -> list[str]:
    """Return sentences on what looks wrong, the gravest first."""
    checks: Sequence[Callable[[Inspection], list[str]]] = (
        _unreadable,
        _untrained,
        _weak,
        _strong,
        _scaling,
        _no_base,
    )
    return [sentence for check in checks for sentence in check(facts)]


def _unreadable(facts: Inspection) -> list[str]:
    by_problem: dict[str, list[str]] = {}
    for module, one in facts.modules.items():
        if one.problem:
            by_problem.setdefault(one.problem, []).append(module)
    return [
        f"{some_of(modules)} cannot be read: {problem}" for problem, modules in by_problem.items()
    ]


def _untrained(facts: Inspection) -> list[str]:
    readable = {module: one for module, one in facts.modules.items() if not one.problem}
    zero = [module for module, one in readable.items() if one.norm == 0]
    if not zero:
        return []
    if len(zero) == len(readable):
        return [
            "no module changes anything (lora_B is zero): the adapter was never trained, or not saved"
        ]
    return [
        f"{len(zero)} of {len(readable)} modules change nothing (lora_B is zero): {some_of(zero)}; were they trained?"
    ]


def _weak(facts: Inspection) -> list[str]:
    norms = {module: one.norm for module, one in facts.modules.items() if one.norm > 0}
    if not norms:
        return []
    usual = median(norms.values())
    dead = [module for module, norm in norms.items() if norm < DEAD * usual]
    return [f"{some_of(dead)} change almost nothing beside the others"] if dead else []


def _strong(facts: Inspection) -> list[str]:
    sentences: list[str] = []
    for group in facts.by_target.values():
        usual = median(one.norm for one in group)
        if len(group) < FEWEST or not usual:
            continue
        extreme = [
            module
            for module, one in facts.modules.items()
            if one in group and one.norm > EXTREME * usual
        ]
        if extreme:
            sentences.append(
                f"{some_of(extreme)}: a norm of more than {EXTREME} times that of the same target in other layers"
            )
    return sentences


def _scaling(facts: Inspection) -> list[str]:
    scaling, (smallest, largest) = facts.scaling, UNUSUAL_SCALING
    if scaling is None or smallest <= abs(scaling) <= largest:
        return []
    alpha, rank = facts.config["lora_alpha"], facts.config["r"]
    return [
        f"the scaling is {scaling:.4g} (lora_alpha {alpha:g}, r {rank}); most adapters have 1 or 2: check that "
        "lora_alpha and r are those of the training"
    ]


def _no_base(facts: Inspection) -> list[str]:
    if facts.base_model:
        return []
    return [
        "the adapter does not name its base model: give it where it is needed (base_model=…, --base-model …)"
    ]
