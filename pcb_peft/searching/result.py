"""The result of a search: the winner, all trials as a table and as a picture."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pcb_peft.evaluation.evaluation import Evaluation
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.recipes.steps import in_words
from pcb_peft.runtime.tables import table
from pcb_peft.searching.files import MARK, is_from_a_search
from pcb_peft.searching.knobs import STEPS
from pcb_peft.searching.picture import draw
from pcb_peft.searching.together import Grouping, LeftOut
from pcb_peft.searching.trials import Objective, Trial
from pcb_peft.writing.atomic import write_file_atomically
from pcb_peft.writing.targets import Overwrite

SHOWN = 10  # lines of the table
TEST = "On the test texts, which the search did not see (other merge: the recipe that it started from):"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GroupMerge:
    """One of several merges: some adapters that go together.

    Attributes:
        members: Their names.
        recipe: The merge of them; None for an adapter that is best used alone.
        test: What it keeps of their tasks on the test texts; None without texts, and for an adapter alone.
    """

    members: tuple[str, ...]
    recipe: Recipe | None = None
    test: Evaluation | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The findings of a search. ``print`` it for the table.

    Attributes:
        recipe: The winner: `merge` makes it.
        best: Its trial.
        trials: All trials of a merge of all adapters, in order.
        objective: What was maximised.
        test: The winner and, as `against`, the start, on texts that the search did not see; None without any.
        left_out: What each adapter costs the others, if that was asked for.
        groupings: The best grouping for each number of merges, if that was asked for.
        merges: The fewest merges that lose no task, if that was asked for.
        notes: What is worth knowing.
    """

    recipe: Recipe
    best: Trial
    trials: tuple[Trial, ...]
    objective: Objective
    test: Evaluation | None = None
    left_out: tuple[LeftOut, ...] = ()
    groupings: tuple[Grouping, ...] = ()
    merges: tuple[GroupMerge, ...] = ()
    notes: tuple[str, ...] = ()

    def pareto(self) -> list[tuple[int, float, float, float]]:
        """Return what no other merge beats both on average and on the worst task: (trial, weight, mean, worst)."""
        points = _points(self.trials)
        return [
            p
            for p in points
            if not any(
                q[2] >= p[2] and q[3] >= p[3] and (q[2] > p[2] or q[3] > p[3]) for q in points
            )
        ]

    def save(
        self,
        recipe: str | Path,
        picture: str | Path | None = None,
        *,
        overwrite: Overwrite = True,
    ) -> list[Path]:
        """Write the winning recipe, those of several merges beside it, and if wanted the picture.

        Args:
            recipe: The file of the winner; several merges, or one beside it that loses no task, are `NAME-1.yaml`,
                `NAME-2.yaml` …
            picture: A file that ends in .png, .svg or .pdf.
            overwrite: Replace files that exist: True, if a search wrote them; "all", whatever they hold.

        Returns:
            The files of the recipes.

        Raises:
            OutputError: A file cannot be written, or must not be replaced.
            UnsupportedError: matplotlib is not installed.
        """
        recipe = Path(recipe)
        files = {recipe: self.recipe}
        several = [merge.recipe for merge in self.merges if merge.recipe is not None]
        if several != [self.recipe]:
            for number, one in enumerate(several, 1):
                files[recipe.with_name(f"{recipe.stem}-{number}{recipe.suffix}")] = one
        for path, content in files.items():
            text = f"# {MARK}\n{content.to_yaml()}"
            write_file_atomically(
                path,
                functools.partial(Path.write_text, data=text, encoding="utf-8"),
                overwrite=overwrite,
                is_ours=is_from_a_search,
            )
        if picture is not None:
            self.plot(picture, overwrite=overwrite)
        return list(files)

    def plot(self, path: str | Path, *, overwrite: Overwrite = True) -> None:
        """Draw the scores over the trials, and the worst task against the mean.

        Raises:
            UnsupportedError: matplotlib is not installed.
            OutputError: The file cannot be written.
        """
        scores = [trial.best(self.objective)[1] for trial in self.trials if trial.kept]
        points = [(mean, worst) for _, _, mean, worst in _points(self.trials)]
        front = [(mean, worst) for _, _, mean, worst in self.pareto()]
        draw(path, scores, points, front, overwrite=overwrite)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        scale, score = self.best.best(self.objective)
        return {
            "best": {
                "trial": self.best.number,
                "candidate": self.best.candidate,
                "scale": scale,
                "score": score,
                "kept": dict(self.best.kept_at_best(self.objective)),
            },
            "recipe": self.recipe.to_yaml(),
            "trials": len(self.trials),
            "pareto": [list(point) for point in self.pareto()],
            "test": self.test and self.test.as_dict(),
            "left_out": [dataclasses.asdict(one) for one in self.left_out],
            "groupings": [dataclasses.asdict(one) for one in self.groupings],
            "merges": [
                {
                    "members": list(one.members),
                    "recipe": one.recipe and one.recipe.to_yaml(),
                    "test": one.test and one.test.as_dict(),
                }
                for one in self.merges
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        ordered = sorted(self.trials, key=lambda trial: -trial.best(self.objective)[1])
        done = [trial for trial in ordered if trial.kept]
        header = ("trial", "score", "mean", "worst", "weight", "what")
        lines = [table(header, [self._row(trial) for trial in done[:SHOWN]], words_last=True)]
        if len(done) > SHOWN:
            lines.append(f"… and {len(done) - SHOWN} more")
        if failed := [trial for trial in ordered if not trial.kept]:
            lines.append(
                f"{len(failed)} could not be merged, such as {described(failed[0].candidate)}: {failed[0].error}"
            )
        for part in (self.left_out, self.groupings):
            lines += ["", *map(str, part)] if part else []
        if self.merges:
            lines.append(self._several())
        if self.test is not None:
            lines += ["", TEST, str(self.test), self._gain()]
        for merge in self.merges:
            if merge.test is not None:
                lines += ["", f"The merge of {' + '.join(merge.members)}:", str(merge.test)]
        said = self.test.notes if self.test is not None else ()
        return "\n".join([*lines, *(note for note in self.notes if note not in said)])

    def _row(self, trial: Trial) -> tuple[str, ...]:
        scale, score = trial.best(self.objective)
        kept = trial.kept[scale].values()
        numbers = [f"{value:.1%}" for value in (score, fmean(kept), min(kept))]
        return str(trial.number), *numbers, f"{scale:.3g}", described(trial.candidate)

    def _several(self) -> str:
        if len(self.merges) == 1:
            winner = self.merges[0].recipe == self.recipe
            return "one merge loses no task" + (
                "" if winner else ", and it is not the winner, which scores higher and loses one"
            )
        alone = [merge.members[0] for merge in self.merges if merge.recipe is None]
        words = f"{len(self.merges)} merges are the fewest that lose no task"
        return words + (f"; use {', '.join(alone)} alone, as it is" if alone else "")

    def _gain(self) -> str:
        """The winner and the start in one sentence."""
        if self.test is None:
            return ""
        kept = [
            (task.kept, task.against.value / task.adapter.value)
            for task in self.test.tasks
            if task.kept is not None and task.against and task.adapter and task.adapter.value
        ]
        if not kept:
            return ""
        found, start = (fmean(column) for column in zip(*kept, strict=True))
        return f"The winner keeps {found:.1%} on average, the recipe that the search started from {start:.1%}."


def described(candidate: Mapping[str, Any]) -> str:
    """Describe a candidate in a line."""
    words = [f"{name}={_value(name, value)}" for name, value in candidate.items()]
    return " ".join(words) or "the recipe"


def _value(name: str, value: Any) -> str:
    if name in STEPS:
        return in_words(tuple(value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _points(trials: Sequence[Trial]) -> list[tuple[int, float, float, float]]:
    return [
        (trial.number, scale, fmean(kept.values()), min(kept.values()))
        for trial in trials
        for scale, kept in trial.kept.items()
    ]
