"""One run of a search: trials until there are enough, each written to the log; then what they add up to."""

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence

from pcb_peft.errors import OptionError
from pcb_peft.evaluation.evaluate import evaluate
from pcb_peft.evaluation.evaluation import Evaluation
from pcb_peft.evaluation.settings import Settings
from pcb_peft.merging.engine import merge
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.progress import say, tracker
from pcb_peft.searching.knobs import Candidate
from pcb_peft.searching.optimisers import Optimiser
from pcb_peft.searching.result import GroupMerge, SearchResult, described
from pcb_peft.searching.together import (
    Group,
    Grouping,
    fewest,
    groupings,
    leave_one_out,
    losing_nothing,
)
from pcb_peft.searching.trials import SEARCH, Proposal, Trial, TrialLog
from pcb_peft.searching.trying import Trier
from pcb_peft.searching.workers import TryAll

MOST_FAILURES = 20  # candidates in a row that cannot be merged, after which a search gives up
MOST_REPEATS = (
    20  # candidates in a row that were tried before, after which the optimiser is not asked
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The parts of a run.

    Attributes:
        trier: Merges and measures; its search space, adapters and texts.
        optimiser: Proposes candidates.
        log: Keeps trials.
        logged: The trials that it held when the run began.
        try_all: Tries several proposals.
        at_a_time: How many.
        progress: Whether bars are shown.
    """

    trier: Trier
    optimiser: Optimiser
    log: TrialLog
    logged: Sequence[Trial]
    try_all: TryAll
    at_a_time: int
    progress: bool | None

    def search(self, count: int, seconds: float | None) -> list[Trial]:
        """Return so many trials of merges: those in the log, and new ones until there are enough or the time is up.

        They are fewer where all that can be tried has been tried.

        Args:
            count: How many.
            seconds: The time after which no trial is begun, those in the log included.

        Raises:
            OptionError: Nothing can be merged.
        """
        if self.log.path is not None:
            say(
                f"{self.log.path} keeps every trial: after a stop, the same command goes on",
                self.progress,
            )
        begun = time.perf_counter() - sum(trial.seconds for trial in self.logged)
        done, asked, known = self._repeated(count)
        for _ in tracker(self.progress)(range(max(0, count - _merged(done))), "search"):
            enough = _merged(done) + 1
            while _merged(done) < min(enough, count):
                if done and self._is_up(begun, seconds):
                    return done
                asked = asked or self._asked(done, count - _merged(done))
                self._round(done, asked, known)
                _check_failures(done, MOST_FAILURES if asked else len(done))
                if not asked:
                    return done
                asked, known = [], 0
        return done

    def _repeated(self, count: int) -> tuple[list[Trial], list[Candidate], int]:
        """The trials in the log; the optimiser is brought to where it was.

        Beside them the candidates of a round that a stop has cut off, and how many of these were tried.
        """
        done: list[Trial] = []
        old = [trial for trial in self.logged if trial.step == SEARCH]
        while len(done) < len(old):
            asked = self._asked(done, max(count - _merged(done), len(old) - len(done)))
            known = old[len(done) :][: max(1, len(asked))]
            done += known
            if len(known) < len(asked):
                return done, asked, len(known)
            self._tell(known)
        return done, [], 0

    def _asked(self, done: Sequence[Trial], most: int) -> list[Candidate]:
        """The next candidates, from the search space's start on; all processes get the same.

        There are none where all have been tried.
        """
        if not done:
            return [self.trier.space.start()]
        tried: dict[str, float | None] = {**self._tried(done)}
        news = (self._new(tried) for _ in range(min(self.at_a_time, most)))
        asked = [candidate for candidate in news if candidate is not None]
        return current().reduce(asked, lambda candidates: candidates[0])

    def _new(self, tried: dict[str, float | None]) -> Candidate | None:
        """A candidate that was not tried, which counts as tried then: the optimiser's, or the first one in order."""
        for _ in range(MOST_REPEATS):
            candidate = self.optimiser.ask()
            key = self.trier.space.key(candidate)
            if key not in tried:
                break
            score = tried[key]
            if score is not None:
                self.optimiser.tell(candidate, score)
        else:
            candidate = self.trier.space.untried(tried)
        if candidate is not None:
            tried[self.trier.space.key(candidate)] = None  # its score is not known yet
        return candidate

    def _tried(self, done: Sequence[Trial]) -> dict[str, float]:
        """The score of each candidate that was tried, by its key."""
        objective, space = self.trier.objective, self.trier.space
        return {space.key(trial.candidate): trial.best(objective)[1] for trial in done}

    def _round(self, done: list[Trial], asked: Sequence[Candidate], known: int) -> None:
        """Try candidates, but for the first ones, which are known; tell the optimiser how all of them did."""
        begin, names = len(done) - known, self.trier.space.names
        aim, best = self._aim(done[:begin])
        proposals = [
            Proposal(number=begin + n, candidate=candidate, members=names, aim=aim, best=best)
            for n, candidate in enumerate(asked)
        ]
        for trial in self.try_all(proposals[known:]):
            self.log.append(trial)
            done.append(trial)
            self._say(trial, done)
        self._tell(done[begin:])

    def _tell(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            self.optimiser.tell(trial.candidate, trial.best(self.trier.objective)[1])

    def _aim(self, done: Sequence[Trial]) -> tuple[float | None, float | None]:
        """The response and the score of the best trial."""
        merged = [trial for trial in done if trial.kept]
        if not merged:
            return None, None
        best = self._best(merged)
        scale, score = best.best(self.trier.objective)
        return scale * best.response, score

    def _best(self, done: Sequence[Trial]) -> Trial:
        return max(done, key=lambda trial: trial.best(self.trier.objective)[1])

    def _say(self, trial: Trial, done: Sequence[Trial]) -> None:
        best, objective = self._best(done), self.trier.objective
        score = f"{trial.best(objective)[1]:.1%}" if trial.kept else "cannot be merged"
        say(
            f"trial {trial.number}: {score}, best so far {best.best(objective)[1]:.1%} (trial {best.number}); "
            f"{described(trial.candidate)}",
            self.progress,
        )

    def _is_up(self, begun: float, seconds: float | None) -> bool:
        taken = current().reduce(time.perf_counter() - begun, max)
        return seconds is not None and taken > seconds

    def attempt(self, best: Trial, wanted: Sequence[tuple[Group, str]]) -> list[Trial]:
        """Try a winner's candidate on some adapters each; what is in the log is not tried again.

        Args:
            best: The winner.
            wanted: The adapters, and the step that the trial is for.
        """
        aim, _ = self._aim([best])
        proposals = [
            Proposal(number=n, candidate=best.candidate, members=group, step=step, aim=aim)
            for n, (group, step) in enumerate(wanted)
        ]
        found = {n: self._known(proposal) for n, proposal in enumerate(proposals)}
        missing = [proposal for proposal in proposals if found[proposal.number] is None]
        trials = iter(self.try_all(missing))
        for proposal in tracker(self.progress)(missing, "which go together"):
            found[proposal.number] = trial = next(trials)
            self.log.append(trial)
        return [trial for trial in found.values() if trial is not None]

    def _known(self, proposal: Proposal) -> Trial | None:
        return next((trial for trial in self.logged if trial.is_of(proposal)), None)

    def result(
        self,
        done: Sequence[Trial],
        settings: Settings,
        *,
        without: bool,
        clusters: bool,
        notes: Sequence[str],
    ) -> SearchResult:
        """Return the winner, what it does on test texts, what each adapter costs the others, and which go together.

        Args:
            done: All trials.
            settings: How tasks are measured.
            without: Leave out each adapter in turn.
            clusters: Find which adapters go together.
            notes: What is worth knowing about the search.
        """
        best, objective = self._best(done), self.trier.objective

        def attempt(wanted: Sequence[tuple[Group, str]]) -> list[Trial]:
            return self.attempt(best, wanted)

        left_out = leave_one_out(best, objective, attempt) if without else []
        found = groupings(best, objective, attempt) if clusters else []
        chosen = fewest(found, settings.threshold) if found else None
        self.trier.validation.release()
        recipe = self.trier.space.recipe_of(best.candidate, best.best(objective)[0])
        return SearchResult(
            recipe=recipe,
            best=best,
            trials=tuple(done),
            objective=objective,
            test=self._tested(recipe, self.trier.space.names, settings, self.trier.space.recipe),
            left_out=tuple(left_out),
            groupings=tuple(found),
            merges=self._merges(best, done, chosen, settings) if chosen else (),
            notes=(*self.trier.validation.notes, *notes, *self._on_the_end(done)),
        )

    def _on_the_end(self, done: Sequence[Trial]) -> list[str]:
        """Notes on trials of an earlier run, and on a search space in which nothing is left to try."""
        notes: list[str] = []
        if self.logged:
            notes.append(f"trials of an earlier run, read from {self.log.path}: {len(self.logged)}")
        space, tried = self.trier.space, self._tried(done)
        if len(tried) > 1 and space.size < math.inf and space.untried(tried) is None:
            notes.append(
                f"all {len(tried)} recipes that --vary (vary) allows were tried: more trials find nothing new"
            )
        return notes

    def _merges(
        self, best: Trial, done: Sequence[Trial], grouping: Grouping, settings: Settings
    ) -> tuple[GroupMerge, ...]:
        """The merge of each group of the winner's; or one of all, if a trial beside the winner loses no task."""
        merges: list[GroupMerge] = []
        point = losing_nothing(done, self.trier.objective, settings.threshold)
        if len(grouping.groups) > 1 and point is not None:
            names, (trial, scale) = self.trier.space.names, point
            recipe = self.trier.space.recipe_of(trial.candidate, scale)
            test = self._tested(recipe, names, settings)
            return (GroupMerge(members=names, recipe=recipe, test=test),)
        for group, scale in zip(grouping.groups, grouping.scales, strict=True):
            if len(group) == 1:
                merges.append(GroupMerge(members=group))
                continue
            recipe = self.trier.space.recipe_of(best.candidate, scale, group)
            several = len(grouping.groups) > 1
            test = self._tested(recipe, group, settings) if several else None
            merges.append(GroupMerge(members=group, recipe=recipe, test=test))
        return tuple(merges)

    def _tested(
        self, recipe: Recipe, members: Group, settings: Settings, against: Recipe | None = None
    ) -> Evaluation | None:
        """A merge on the test texts of its members, beside another recipe."""
        validation = self.trier.validation
        test = {name: texts for name, texts in validation.test.items() if name in members}
        if not test:
            return None
        adapters = [adapter for adapter in self.trier.adapters if adapter.name in members]
        options = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Settings)}
        labels = {**settings.labels, **validation.labels}
        options |= {"labels": {n: labels[n] for n in labels if n in test}, "rename": {}}
        return evaluate(
            merge(recipe, adapters, progress=False),
            adapters,
            validation.base_model,
            test,
            against=against and merge(against, adapters, progress=False),
            **options,
        )


def _merged(done: Sequence[Trial]) -> int:
    """The number of trials that could be merged."""
    return sum(bool(trial.kept) for trial in done)


def _check_failures(done: Sequence[Trial], most: int) -> None:
    """Raises OptionError if so many candidates cannot be merged, one after the other."""
    row = [*itertools.takewhile(lambda trial: not trial.kept, reversed(done))]
    if len(row) >= most:
        raise OptionError(
            f"{len(row)} candidates in a row could not be merged, the last one because: {row[0].error}; vary less"
        )
