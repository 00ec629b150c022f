"""The adapters that go together: each adapter left out in turn, and groups that are merged apart."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from pcb_peft.runtime.shown import counted
from pcb_peft.searching.trials import TOGETHER, WITHOUT, Objective, Trial

Group = tuple[str, ...]
"""The names of adapters that are merged with each other."""

TryNamed = Callable[[Sequence[tuple[Group, str]]], list[Trial]]
"""A function that tries the winner's candidate on some adapters each, for one of the steps of a trial."""

NOTHING = 0.01  # a change of the mean that is called nothing: about its noise at 250 texts per task


@dataclasses.dataclass(frozen=True, slots=True)
class LeftOut:
    """The cost of one adapter to the others.

    Attributes:
        name: The adapter.
        kept: What the others keep on average in the merge of all.
        kept_without: What they keep if it is left out.
    """

    name: str
    kept: float
    kept_without: float

    def __str__(self) -> str:
        gain = self.kept_without - self.kept
        words = "gain nothing"
        if abs(gain) >= NOTHING:
            words = f"{'gain' if gain > 0 else 'lose'} {100 * abs(gain):.1f} points"
        return (
            f"without {self.name} the others {words}: {self.kept:.1%} on average with it, "
            f"{self.kept_without:.1%} without it"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Grouping:
    """All adapters in groups, one merge per group.

    Attributes:
        groups: The groups.
        scales: The common weight of each group's merge.
        kept: What is kept of each task in the merge of its group; an adapter alone keeps 1.
    """

    groups: tuple[Group, ...]
    scales: tuple[float, ...]
    kept: Mapping[str, float]

    def __str__(self) -> str:
        worst = min(self.kept, key=self.kept.__getitem__)
        names = " | ".join(" + ".join(group) for group in self.groups)
        return (
            f"{counted(len(self.groups), 'merge')}: {fmean(self.kept.values()):.1%} on average, "
            f"{self.kept[worst]:.1%} of {worst}: {names}"
        )


def leave_one_out(best: Trial, objective: Objective, attempt: TryNamed) -> list[LeftOut]:
    """Return what each adapter costs the others.

    Args:
        best: The winner, a merge of all.
        objective: What the common weight is chosen by.
        attempt: Tries the winner's candidate on some adapters.
    """
    names, kept = best.members, best.kept_at_best(objective)
    if len(names) < 2:
        return []
    rest = [tuple(name for name in names if name != out) for out in names]
    trials = attempt([(group, WITHOUT) for group in rest])
    return [
        LeftOut(
            out,
            fmean(kept[name] for name in group),
            fmean(trial.kept_at_best(objective).values()) if trial.kept else 0.0,
        )
        for out, group, trial in zip(names, rest, trials, strict=True)
    ]


def groupings(best: Trial, objective: Objective, attempt: TryNamed) -> list[Grouping]:
    """Return the best grouping that was found for each number of merges, from one merge of all to none.

    Every pair is merged and measured. Then, from single adapters on, the two groups are joined whose pairs keep most on
    average, and the new group is merged and measured itself.

    Args:
        best: The winner, a merge of all.
        objective: What groups are chosen by.
        attempt: Tries the winner's candidate on some adapters.
    """
    pairs = list(itertools.combinations(best.members, 2))
    tried = attempt([(pair, TOGETHER) for pair in pairs])
    scores = {
        frozenset(pair): trial.best(objective)[1] for pair, trial in zip(pairs, tried, strict=True)
    }
    known = {trial.members: trial for trial in [*tried, best]}
    groups: list[Group] = [(name,) for name in best.members]
    found = [_measured(groups, known, objective)]
    while len(groups) > 1:
        one, other = max(itertools.combinations(groups, 2), key=lambda two: _affinity(*two, scores))
        joined = tuple(name for name in best.members if name in (*one, *other))
        if joined not in known:
            (known[joined],) = attempt([(joined, TOGETHER)])
        groups = [group for group in groups if group not in (one, other)] + [joined]
        found.append(_measured(groups, known, objective))
    return found[::-1]


def fewest(found: Sequence[Grouping], threshold: float) -> Grouping:
    """Return the grouping with the fewest merges that loses no task.

    Args:
        found: Groupings, from one merge of all to none.
        threshold: What has to be kept of every task.
    """
    return next(one for one in found if _loses_nothing(one.kept, threshold))


def losing_nothing(
    trials: Sequence[Trial], objective: Objective, threshold: float
) -> tuple[Trial, float] | None:
    """Return the best merge of all adapters that loses no task, with its common weight; None if there is none.

    It need not be the winner, which may keep more on average.

    Args:
        trials: Merges of all adapters.
        objective: What the best is chosen by.
        threshold: What has to be kept of every task.
    """
    points = [
        (trial, scale)
        for trial in trials
        for scale, kept in trial.kept.items()
        if _loses_nothing(kept, threshold)
    ]
    return max(points, key=lambda point: objective(point[0].kept[point[1]]), default=None)


def _loses_nothing(kept: Mapping[str, float], threshold: float) -> bool:
    """True if every task keeps enough; where all of it is kept, a higher threshold asks for no more."""
    return min(kept.values()) >= min(threshold, 1.0)


def _affinity(one: Group, other: Group, scores: Mapping[frozenset[str], float]) -> float:
    """The share that the pairs from one group to another keep on average."""
    return fmean(scores[frozenset(pair)] for pair in itertools.product(one, other))


def _measured(
    groups: Sequence[Group], known: Mapping[Group, Trial], objective: Objective
) -> Grouping:
    kept: dict[str, float] = {}
    scales: list[float] = []
    for group in groups:
        trial = known.get(group)
        scales.append(trial.best(objective)[0] if trial else 1.0)
        if trial is None:  # an adapter alone
            kept[group[0]] = 1.0
        elif trial.kept:
            kept |= trial.kept_at_best(objective)
        else:  # these cannot be merged
            kept |= dict.fromkeys(group, 0.0)
    return Grouping(tuple(groups), tuple(scales), kept)
