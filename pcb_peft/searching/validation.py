"""The texts on which a search chooses, and those on which its winner is measured."""

import dataclasses
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.response import responses
from pcb_peft.data.batches import Row
from pcb_peft.errors import OptionError
from pcb_peft.evaluation.bench import Bench, open_bench
from pcb_peft.evaluation.jobs import Job, jobs_of, limited, no_better_than_guessing
from pcb_peft.evaluation.pairing import pair
from pcb_peft.evaluation.settings import Settings
from pcb_peft.evaluation.subjects import SubjectMaker
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.runtime.progress import say
from pcb_peft.runtime.scratch import shared_directory


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Measures merges on validation texts.

    Attributes:
        bench: The base model.
        base_model: Its path or hub id.
        jobs: The validation texts by task.
        own: The score of each task's adapter on them, by task.
        test: Texts for the winner, by task.
        labels: The names of the classes and answers, by task.
        facts: All that the scores depend on, beside the merges: hashes of the texts and the base model, settings.
        notes: What is worth knowing about the texts.
    """

    bench: Bench
    base_model: str
    jobs: Sequence[Job]
    own: Mapping[str, float]
    test: Mapping[str, Any]
    labels: Mapping[str, Sequence[str]]
    facts: Sequence[object]
    notes: tuple[str, ...]

    def kept(self, merged: Adapter, names: Collection[str]) -> dict[str, float]:
        """Return what a merge keeps of some adapters' tasks, as a share of each adapter's own score."""
        with shared_directory() as scratch:
            subject = _maker(self.bench, self.base_model, scratch).make(merged, "merge")
            scores = {
                job.name: self.bench.score(subject, job).value
                for job in self.jobs
                if job.name in names
            }
        return {name: score / self.own[name] for name, score in scores.items()}

    def release(self) -> None:
        """Forget the model, so that another one can be loaded."""
        self.bench.host.release()

    def response(self, merged: Adapter, adapters: Sequence[Adapter]) -> float:
        """Return the mean response of a merge along its adapters."""
        return fmean(found.total for found in responses(merged, adapters).values())


def prepare(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    data: Any,
    test_data: Any,
    settings: Settings,
    own: Mapping[str, float] | None = None,
) -> Validation:
    """Read the texts, set some aside for the test, and measure each adapter alone.

    Args:
        recipe: Where the search starts.
        adapters: Its adapters, by different names.
        data: Validation texts, as `evaluate` takes them.
        test_data: Test texts; None: one half of `data`.
        settings: How tasks are measured.
        own: The score of each adapter alone, where it is known.

    Raises:
        OptionError: A task has no adapter, so that there is nothing to compare with, or its adapter scores 0.
    """
    base = recipe.base_model or next((a.base_model for a in adapters if a.base_model), None)
    if base is None:
        raise OptionError("the base model is not known: give base_model (--base-model)")
    pairs, notes = pair(adapters, data)
    tested = None if test_data is None else pair(adapters, test_data)[0]
    unseen = [a.name for a in adapters if a.name not in [one.name for one in pairs]]
    if unseen:
        notes = [
            f"no data for {', '.join(unseen)}: the search does not mind if their tasks are lost"
        ]
        say(notes[0], settings.progress)
    bench = open_bench(base, settings)
    jobs = jobs_of(pairs, bench.host, settings)
    if tested is None:
        jobs, test, said = _split(jobs, settings.limit)
        notes += said
    else:
        given = jobs_of(tested, bench.host, settings)
        test = {job.name: _rows(limited(job, settings.limit)) for job in given}
    notes += _on_the_test(jobs, test)
    jobs = [limited(job, settings.limit) for job in jobs]
    if own is None:
        own, doubts = _own(bench, base, jobs)
        notes += doubts
        for doubt in doubts:
            say(doubt, settings.progress)
    return Validation(
        bench=bench,
        base_model=base,
        jobs=jobs,
        own=own,
        test=test,
        labels={job.name: job.texts.labels for job in jobs if job.texts and job.texts.labels},
        facts=(
            [(job.name, job.content(settings.limit)) for job in jobs],
            bench.base_digest,
            settings.max_length,
            str(settings.dtype),
        ),
        notes=tuple(notes),
    )


def _split(jobs: Sequence[Job], limit: int | None) -> tuple[list[Job], dict[str, Any], list[str]]:
    """A random half of the texts of each task for validation, the other half for the test; always the same halves.

    Rows of the same text stay together.
    """
    validation: list[Job] = []
    test: dict[str, Any] = {}
    for job in jobs:
        texts = list(dict.fromkeys(map(_text, job.texts.rows))) if job.texts else []
        if len(texts) < 2:
            validation.append(job)
            continue
        chosen = random.Random(0).sample(texts, (len(texts) + 1) // 2)
        halves = [_some(job, {*chosen}), _some(job, {*texts} - {*chosen})]
        validation.append(halves[0])
        test[job.name] = _rows(limited(halves[1], limit))
    note = "no test texts were given: the search saw one half of each file, and the other half is the test"
    return validation, test, [note] if test else []


def _some(job: Job, chosen: Collection[tuple[str, str]]) -> Job:
    """The same task with some of its texts."""
    texts = job.texts
    rows = tuple(row for row in texts.rows if _text(row) in chosen) if texts else ()
    return dataclasses.replace(job, texts=texts and dataclasses.replace(texts, rows=rows))


def _text(row: Row) -> tuple[str, str]:
    """The text of a row, without its answer."""
    return str(row.get("prompt", row.get("text"))), str(row.get("text_pair", ""))


def _on_the_test(jobs: Sequence[Job], test: Mapping[str, Any]) -> list[str]:
    """Notes on tasks that no text tests, and on test texts that the search sees, too."""
    untested = [job.name for job in jobs if job.name not in test]
    notes = [
        f"no test for {name}: its score is on what the search chose by, and too good"
        for name in untested
    ]
    for job in jobs:
        rows = test.get(job.name) if job.texts else None
        seen = {*map(_text, job.texts.rows)} if job.texts else set[tuple[str, str]]()
        both = sum(_text(row) in seen for row in rows) if isinstance(rows, list) else 0
        if both:
            notes.append(
                f"{job.name}: {both} of {len(rows or ())} test texts are among the validation texts, too, so that the "
                "test is too good; take them out"
            )
    return notes


def _rows(job: Job) -> Any:
    return list(job.texts.rows) if job.texts else job.pair.data


def _own(bench: Bench, base: str, jobs: Sequence[Job]) -> tuple[dict[str, float], list[str]]:
    """The score of each task's own adapter, and notes on adapters that do not know their task."""
    own: dict[str, float] = {}
    notes: list[str] = []
    with shared_directory() as scratch:
        maker = _maker(bench, base, scratch)
        for job in jobs:
            if job.adapter is None:
                raise OptionError(
                    f"{job.name} is no adapter's task, with nothing to compare with; name the data as the adapter"
                )
            score = bench.score(maker.make(job.adapter, job.name), job)
            own[job.name] = score.value
            notes += no_better_than_guessing(job, score)
            if own[job.name] <= 0:
                raise OptionError(
                    f"{job.name}: the adapter alone scores 0 on its own texts, so that there is nothing to keep; look "
                    "whether they are those of its task, and the labels in the order of the head's rows"
                )
    return own, notes


def _maker(bench: Bench, base_model: str, scratch: Path) -> SubjectMaker:
    return SubjectMaker(base_model, bench.host.dequantize, scratch, bench.cache)
