"""The rank of a result, as users ask for it: parsed once, matched everywhere.

``parse_rank(16)`` is `FixedRank(16)`, ``parse_rank(0.9)`` is `EnergyFraction(0.9)`, ``parse_rank("budget:200")`` is
`RankBudget(200)`; `as_given` of each is what the user wrote.
"""

import dataclasses
import re
from typing import TypeAlias

from pcb_peft.errors import OptionError
from pcb_peft.runtime.shown import quoted

RankLike: TypeAlias = "int | float | str | RankChoice | None"
"""A rank as users write it: 16, 0.9, "budget:200", "utility:200", "full", or None."""

_BUDGET = re.compile(r"(budget|utility):([1-9]\d*)")


@dataclasses.dataclass(frozen=True, slots=True)
class Lossless:
    """Every direction is kept; a space whose results have full rank keeps the sum of the adapters' ranks."""

    @property
    def as_given(self) -> None:
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class FixedRank:
    """A rank that no module exceeds."""

    rank: int

    @property
    def as_given(self) -> int:
        return self.rank


@dataclasses.dataclass(frozen=True, slots=True)
class EnergyFraction:
    """The lowest rank, module by module, that keeps this fraction of ‖ΔW‖²_F."""

    fraction: float

    @property
    def as_given(self) -> float:
        return self.fraction


@dataclasses.dataclass(frozen=True, slots=True)
class RankBudget:
    """A total of ranks, distributed over all modules so that the least energy is lost."""

    total: int

    @property
    def as_given(self) -> str:
        return f"budget:{self.total}"


@dataclasses.dataclass(frozen=True, slots=True)
class NetUtility:
    """A total of directions of the adapters, chosen before the merge by their net utility."""

    total: int

    @property
    def as_given(self) -> str:
        return f"utility:{self.total}"


@dataclasses.dataclass(frozen=True, slots=True)
class Full:
    """A dense ΔW, for folding."""

    @property
    def as_given(self) -> str:
        return "full"


Truncation: TypeAlias = Lossless | FixedRank | EnergyFraction
"""The ranks that can be given to one module without looking at the others."""

RankChoice: TypeAlias = Lossless | FixedRank | EnergyFraction | RankBudget | NetUtility | Full

LOSSLESS = Lossless()


def module_rank(rank: RankChoice) -> Truncation | Full:
    """Return the rank of a module before a budget is distributed, which truncates later what is kept in full now."""
    match rank:
        case RankBudget() | NetUtility():
            return Lossless()
        case _:
            return rank


def parse_rank(given: object) -> RankChoice:
    """Parse a rank as users write it.

    >>> parse_rank(16), parse_rank("budget:200").as_given
    (FixedRank(rank=16), 'budget:200')

    Raises:
        OptionError: It is not a rank.
    """
    match given:
        case Lossless() | FixedRank() | EnergyFraction() | RankBudget() | NetUtility() | Full():
            return given
        case None:
            return Lossless()
        case "full":
            return Full()
        case bool():
            pass
        case int() if given >= 1:
            return FixedRank(given)
        case float() if 0 < given < 1:
            return EnergyFraction(given)
        case str() if found := _BUDGET.fullmatch(given):
            total = int(found[2])
            return RankBudget(total) if found[1] == "budget" else NetUtility(total)
        case _:
            pass
    raise OptionError(
        f"rank is {quoted(given)}; it must be an integer from 1, a fraction in (0, 1) of the energy to keep, "
        "'budget:N' (N ranks for all modules together), 'utility:N' (the N most useful directions of the adapters), "
        "'full' (dense, for folding), or None (lossless where the space allows it)"
    )
