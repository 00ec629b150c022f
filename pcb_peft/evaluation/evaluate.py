"""Measure what a merge kept of each of its tasks."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import AdapterLike, load_adapters
from pcb_peft.adapters.names import named_apart
from pcb_peft.base.model import lazy_base
from pcb_peft.errors import OptionError
from pcb_peft.evaluation.bench import Bench, open_bench, versions
from pcb_peft.evaluation.card import write_to_card as write_card
from pcb_peft.evaluation.controls import random_adapter, uniform_soup
from pcb_peft.evaluation.evaluation import Evaluation
from pcb_peft.evaluation.jobs import Job, jobs_of, limited, no_better_than_guessing
from pcb_peft.evaluation.pairing import HARNESS, TaskData, pair
from pcb_peft.evaluation.scores import Score, TaskScores, worst_first
from pcb_peft.evaluation.settings import Settings
from pcb_peft.evaluation.subjects import BASE, Subject, SubjectMaker
from pcb_peft.merging.result import MergedAdapter
from pcb_peft.recipes.recipe import FILE_NAME, Recipe, read_recipe
from pcb_peft.runtime.paths import expanded, similar_path
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.scratch import shared_directory
from pcb_peft.writing.lines import append_line
from pcb_peft.writing.model_card import public_name
from pcb_peft.writing.targets import check_file_target

FEW = 100  # texts: with fewer the interval of an accuracy is some 20 points wide


def evaluate(  # noqa: PLR0913  (every choice of an evaluation, by name)
    merged: AdapterLike,
    adapters: Sequence[AdapterLike] | None = None,
    base_model: str | Path | None = None,
    data: Mapping[str, TaskData] | Sequence[TaskData] | TaskData = (),
    *,
    tasks: Sequence[str] = (),
    against: AdapterLike | None = None,
    controls: bool = False,
    measure: str = "auto",
    labels: Mapping[str, Sequence[str]] | None = None,
    rename: Mapping[str, str] | None = None,
    length_normalised: bool = False,
    limit: int | None = None,
    budget: float | str | None = None,
    threshold: float = 0.8,
    confidence: float = 0.95,
    batch_size: int = 32,
    max_length: int = 512,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    dequantize: bool = False,
    cache: bool | str | Path = True,
    log: str | Path | None = None,
    write_to_card: bool = False,
    progress: bool | None = None,
) -> Evaluation:
    """Measure the base model, each adapter alone and their merge on each adapter's task.

    One model is in memory. PEFT loads the adapters and the merge, as it does for those who use them. Each task is
    answered with its own head: that in the adapter's file, or the one that the merge keeps for it.

    Args:
        merged: A merge: what `merge_adapters` returned, a directory or hub id, or the directory of a folded model.
        adapters: Those that went into it, in any form that `merge_adapters` takes; default: what the merge's recipe
            names.
        base_model: Path or hub id; default: what the recipe or the first adapter says.
        data: What each task is measured on: a ``.jsonl`` file, rows, or a function that takes the model and returns a
            score; "lm-eval:NAME" is a task of lm-evaluation-harness. By the adapter's name, or one per adapter in
            order. A row has `text` (or `prompt`), and if wanted `text_pair`, `label`, `answer` or `choices`.
        tasks: Names of further tasks of lm-evaluation-harness, which no adapter was trained on.
        against: Another merge to compare with, text by text.
        controls: Also measure a random adapter of the merge's norm, and the plain average of the adapters.
        measure: "head" (accuracy of the classification head), "choose" (accuracy of the most likely answer), "nearest"
            (zero-shot accuracy of an encoder: the label whose name is nearest to the text), "exact" (generated answers
            that are right to the letter), "loss" (1/perplexity), or "auto": what the rows allow.
        labels: Names of the classes in the order of the head's rows, by task; default: what task.json or config.json
            beside the adapter says.
        rename: Labels of the data to the names that the head knows.
        length_normalised: Choose an answer by its likelihood per token.
        limit: Texts per task, evenly spread over the data; default: all.
        budget: Time for everything ("5m"), or tokens ("200k tokens"), to which the number of texts is cut.
        threshold: A task is lost if the merge keeps less than this share of the adapter's score.
        confidence: Level of the confidence intervals.
        batch_size: Texts at a time.
        max_length: Tokens; longer texts are cut.
        dtype: Of the model in memory, such as ``torch.bfloat16``.
        device: Where the model runs; default: a GPU if there is one.
        tokenizer: Default: the base model's.
        dequantize: Compute the weights of a quantised base model from their codes, as a merge's recipe may say, too.
            Otherwise transformers runs it with the library that made it.
        cache: Keep outcomes by the hashes of the files and texts: True for the user's cache directory, a directory, or
            False.
        log: A file to which the result is appended as a line of JSON.
        write_to_card: Put the table into the README.md of the merge's directory, and its numbers beside it.
        progress: Show bars; default: on a terminal.

    Returns:
        The scores, the worst task first; ``print`` shows them as a table.

    Raises:
        OptionError: Data and adapters that do not belong together, labels that a head does not know …
        AdapterError: An adapter cannot be read.
        BaseModelError: The base model cannot be loaded.
        MismatchError: An adapter does not fit the base model.
        OutputError: The log or the card cannot be written.

    Example:
        >>> result = evaluate("merged", ["math-lora", "code-lora"], data=["math.jsonl", "code.jsonl"])
        >>> print(result)
        >>> result.lost
        ('math-lora',)
    """
    settings = Settings(
        measure=measure,
        labels=labels or {},
        rename=rename or {},
        length_normalised=length_normalised,
        limit=limit,
        budget=budget,
        threshold=threshold,
        confidence=confidence,
        batch_size=batch_size,
        max_length=max_length,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
        dequantize=dequantize,
        cache=cache,
        progress=progress,
    )
    outputs = _outputs(log, merged if write_to_card else None)
    loaded, base, settings = _loaded(merged, adapters, base_model, settings)
    result = _evaluated(merged, loaded, base, data, tasks, against, settings, controls=controls)
    return _written(result, *outputs)


def _outputs(log: str | Path | None, merged: AdapterLike | None) -> tuple[Path | None, Path | None]:
    """The log, and the directory of a merge whose card is written; None for what is not.

    Raises:
        OptionError: The merge is in no directory.
        OutputError: The log cannot be written.
    """
    if log is not None:
        log = expanded(log)
        check_file_target(log, overwrite="all")  # a line is added
    return log, None if merged is None else _directory(merged)


def _directory(merged: AdapterLike) -> Path:
    """The directory of a saved merge.

    Raises:
        OptionError: The merge is in none.
    """
    if not isinstance(merged, str | Path):
        raise OptionError(
            "write_to_card: the merge is in memory; save it, and evaluate its directory"
        )
    directory = expanded(merged)
    if not directory.is_dir():
        hint = similar_path(str(merged))
        raise OptionError(
            f"write_to_card (--write-to-card): {merged} is no directory here{hint and f'; {hint}'}"
        )
    return directory


def _evaluated(
    merged: AdapterLike,
    adapters: Sequence[Adapter],
    base: str,
    data: Mapping[str, TaskData] | Sequence[TaskData] | TaskData,
    tasks: Sequence[str],
    against: AdapterLike | None,
    settings: Settings,
    *,
    controls: bool,
) -> Evaluation:
    pairs, notes = pair(adapters, _with_harness(data, tasks, adapters))
    bench = open_bench(base, settings)
    kind = next((adapter.task_type for adapter in adapters if adapter.task_type), None)
    jobs = jobs_of(pairs, bench.host, settings, kind)
    with shared_directory() as scratch:
        maker = SubjectMaker(base, settings.dequantize, scratch, bench.cache)
        subjects = _subjects(maker, merged, against, adapters if controls else ())
        jobs = _within_budget(bench, jobs, len(subjects), settings)
        scores = _scores(bench, jobs, subjects, maker, settings)
    own = [(job, row.adapter) for job, row in zip(jobs, scores, strict=True) if row.adapter]
    guessing = [note for job, score in own for note in no_better_than_guessing(job, score)]
    return Evaluation(
        name=subjects["merged"].title,
        tasks=worst_first(scores),
        settings=_facts(base, subjects["merged"], scores, settings),
        notes=(*notes, *guessing, *_notes(scores)),
    )


def _loaded(
    merged: AdapterLike,
    adapters: Sequence[AdapterLike] | None,
    base_model: str | Path | None,
    settings: Settings,
) -> tuple[list[Adapter], str, Settings]:
    """The adapters, by different names, their base model, and the settings with what the recipe says of it.

    Raises:
        OptionError: Nobody says which they are.
    """
    if isinstance(adapters, str | Path):
        raise OptionError(f"adapters is {str(adapters)!r}; it must be a list: [{str(adapters)!r}]")
    recipe = None if adapters is not None and base_model is not None else _recipe(merged)
    if recipe is not None:
        adapters = recipe.adapters if adapters is None else adapters
        base_model = base_model or recipe.base_model
        dequantize = settings.dequantize or recipe.dequantize
        settings = dataclasses.replace(settings, dequantize=dequantize)
    opened = lazy_base(base_model, dequantize=settings.dequantize)
    loaded = named_apart(load_adapters(adapters or (), base_model=opened))
    base = base_model or next((a.base_model for a in loaded if a.base_model), None)
    if base is None:
        unnamed = (
            f"; adapters and base model are read from {FILE_NAME} in a merge's directory, and {_lack(merged)}"
            if recipe is None and adapters is None
            else ""
        )
        raise OptionError(f"the base model is not known: give base_model (--base-model){unnamed}")
    return loaded, str(base), settings


def _lack(merged: AdapterLike) -> str:
    """The reason why no recipe was read."""
    if not isinstance(merged, str | Path) or expanded(merged).is_dir():
        return f"{merged} has none"
    hint = similar_path(str(merged))
    return f"there is no directory {merged}{hint and f'; {hint}'}"


def _recipe(merged: AdapterLike) -> Recipe | None:
    """The recipe of a merge; None where it has none."""
    if isinstance(merged, MergedAdapter):
        return merged.recipe
    file = expanded(merged) / FILE_NAME if isinstance(merged, str | Path) else None
    return read_recipe(file) if file is not None and file.is_file() else None


def _with_harness(
    data: Mapping[str, TaskData] | Sequence[TaskData] | TaskData,
    tasks: Sequence[str],
    adapters: Sequence[Adapter],
) -> Mapping[str, TaskData] | Sequence[TaskData] | TaskData:
    """The data with tasks of lm-evaluation-harness beside them."""
    if not tasks:
        return data
    given = {} if not data and not isinstance(data, Mapping) else data
    found, _ = pair(adapters, given) if given else ([], [])
    named = {one.name: one.data for one in found}
    return named | {Path(task).stem: f"{HARNESS}{task}" for task in tasks}


def _subjects(
    maker: SubjectMaker,
    merged: AdapterLike,
    against: AdapterLike | None,
    controlled: Sequence[Adapter],
) -> dict[str, Subject]:
    """The subjects that run all tasks: the merge, the other merge and the controls."""
    subjects = {"merged": maker.make(merged, "merge")}
    if against is not None:
        subjects["against"] = maker.make(against, "other merge")
    if controlled:
        merge = subjects["merged"].adapter
        if merge is None:
            raise OptionError(
                "controls need a merge that is an adapter: the norm of a folded model is not known"
            )
        subjects["random"] = maker.make(random_adapter(merge), "random")
        soup = uniform_soup(controlled, maker.base_model, dequantize=maker.dequantize)
        subjects["soup"] = maker.make(soup, "soup")
    return subjects


def _within_budget(
    bench: Bench, jobs: Sequence[Job], subjects: int, settings: Settings
) -> list[Job]:
    """The jobs with as many texts as the limit and the budget allow."""
    cut = [limited(job, settings.limit) for job in jobs]
    if settings.budget is None:
        return cut
    passes = [subjects + 1 + (job.adapter is not None) for job in jobs]
    return bench.cut(cut, passes, settings.budget)


def _scores(
    bench: Bench,
    jobs: Sequence[Job],
    subjects: Mapping[str, Subject],
    maker: SubjectMaker,
    settings: Settings,
) -> list[TaskScores]:
    """Run all subjects on all jobs; what needs the same model, or the same adapter, comes together."""
    runs: list[tuple[Job, str, Subject]] = []
    for job in jobs:
        own = {} if job.adapter is None else {"adapter": maker.make(job.adapter, job.name)}
        runs += [(job, role, s) for role, s in ({"base": BASE} | own | dict(subjects)).items()]
    runs.sort(key=lambda run: (run[0].task_type, run[2].checkpoint or "", run[1]))
    found: dict[str, dict[str, Score]] = {job.name: {} for job in jobs}
    for job, role, subject in bench.track(runs, "evaluate"):
        found[job.name][role] = bench.score(subject, job)
    return [_row(job, found[job.name], settings) for job in jobs]


def _row(job: Job, scores: Mapping[str, Score], settings: Settings) -> TaskScores:
    roles = ("base", "adapter", "merged", "against")
    return TaskScores(
        name=job.name,
        metric=job.metric,
        texts=len(scores["merged"].outcomes),
        controls={name: score for name, score in scores.items() if name not in roles},
        threshold=settings.threshold,
        confidence=settings.confidence,
        **{role: scores[role] for role in roles if role in scores},
    )


def _facts(
    base: str, merged: Subject, scores: Sequence[TaskScores], settings: Settings
) -> dict[str, object]:
    """Facts about the run, for the log."""
    return {
        "base_model": public_name(base) or Path(base).name,
        "merge": merged.digest,
        "texts": {score.name: score.texts for score in scores},
        "dtype": str(settings.dtype).removeprefix("torch."),
        "threshold": settings.threshold,
        "confidence": settings.confidence,
        "versions": versions(),
    }


def _notes(scores: Sequence[TaskScores]) -> list[str]:
    few = [score.name for score in scores if 0 < score.texts < FEW]
    if not few:
        return []
    return [
        f"fewer than {FEW} texts for {', '.join(few)}: look at the intervals before you trust a difference"
    ]


def _written(result: Evaluation, log: Path | None, card_directory: Path | None) -> Evaluation:
    """Append to the log and write the card, in one process; return what was written.

    Raises:
        OutputError: That cannot be done.
    """
    if current().is_main:
        if log is not None:
            _append(log, result)
        if card_directory is not None:
            write_card(result, card_directory)
    current().barrier()
    return result


def _append(log: Path, result: Evaluation) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    line = json.dumps({"time": now, **result.as_dict()}, ensure_ascii=False)
    append_line(log, line)
