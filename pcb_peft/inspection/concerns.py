"""Things that look wrong in one adapter, in words."""

import math
from collections.abc import Callable, Collection, Sequence
from statistics import median

from pcb_peft.inspection.facts import Inspection
from pcb_peft.runtime.shown import some_of

FEWEST = 3
"""Modules of a target that tell what is usual."""
DEAD = 1e-4
"""A module whose norm is a smaller part of the median is called dead."""
EXTREME = 20
"""A module whose norm is more times the median of its target is called extreme."""
MOST_PROBLEMS = 3
"""Sentences on modules that cannot be read; a file of NaN has one for each module."""
HUGE = 10
"""A root mean square of the entries of ΔW above this is called huge; that of W is about 0.02."""
ZERO_WHERE = {"LoRA": "lora_B is zero", "DoRA": "lora_B is zero", "(IA)³": "all its factors are 1"}
VECTORS = ("(IA)³",)
UNUSUAL_SCALING = (0.1, 8)
"""Scalings below and above are rare; most adapters have 1 or 2."""


def concerns(facts: Inspection) -> list[str]:
    """Return sentences on what looks wrong, the gravest first."""
    checks: Sequence[Callable[[Inspection], list[str]]] = (
        _unreadable,
        _unmeasured,
        _untrained,
        _weak,
        _strong,
        _huge,
        _scaling,
        _no_base,
    )
    return [sentence for check in checks for sentence in check(facts)]


def _unreadable(facts: Inspection) -> list[str]:
    damaged = {
        module: one.problem
        for module, one in facts.modules.items()
        if one.problem and not one.needs_base
    }
    by_problem: dict[str, list[str]] = {}
    for module, problem in damaged.items():
        by_problem.setdefault(problem.removeprefix(f"{module}: "), []).append(module)
    sentences = [
        f"{some_of(modules)} cannot be read: {problem}" for problem, modules in by_problem.items()
    ]
    more = len(sentences) - MOST_PROBLEMS
    if more <= 0:
        return sentences
    return [*sentences[:MOST_PROBLEMS], f"{len(damaged)} modules cannot be read in all"]


def _unmeasured(facts: Inspection) -> list[str]:
    unknown = {module: one.problem for module, one in facts.modules.items() if one.needs_base}
    if not unknown:
        return []
    module, why = next(iter(unknown.items()))
    return [
        f"the norms of {len(unknown)} modules are not known without the base model "
        f"({why.removeprefix(f'{module}: ')}): give it (base_model=…, --base-model …)"
    ]


def _untrained(facts: Inspection) -> list[str]:
    readable = {module: one for module, one in facts.modules.items() if not one.problem}
    zero = {module: one for module, one in readable.items() if one.norm == 0}
    if not zero:
        return []
    why = _why_zero(facts, {one.kind for one in zero.values()})
    if len(zero) == len(readable):
        return [f"no module changes anything{why}: the adapter was never trained, or not saved"]
    return [
        f"{len(zero)} of {len(readable)} modules change nothing{why}: {some_of(list(zero))}; were they trained?"
    ]


def _why_zero(facts: Inspection, kinds: Collection[str]) -> str:
    """Say what makes modules of these kinds change nothing."""
    if facts.scaling == 0:
        return " (lora_alpha is 0)"
    reasons = {ZERO_WHERE[kind] for kind in kinds if kind in ZERO_WHERE}
    return f" ({reasons.pop()})" if len(reasons) == 1 else ""


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


def _huge(facts: Inspection) -> list[str]:
    """Entries far above those of any trained weight, be it in all modules."""
    sizes = {
        module: one.norm / math.sqrt(math.prod(one.shape))
        for module, one in facts.modules.items()
        if one.kind not in VECTORS and not one.needs_base
    }
    huge = [module for module, size in sizes.items() if size > HUGE]
    if not huge:
        return []
    return [
        f"{some_of(huge)}: entries of ΔW are about {max(sizes.values()):.2g} in size, and weights of trained models "
        "about 0.02: has the training diverged, or is the scaling wrong?"
    ]


def _scaling(facts: Inspection) -> list[str]:
    scaling, (smallest, largest) = facts.scaling, UNUSUAL_SCALING
    if not scaling or smallest <= abs(scaling) <= largest:
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
