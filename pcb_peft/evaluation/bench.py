"""Subjects on tasks: each runs once, with the right head, and what was run before comes from the cache."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pcb_peft.data.batches import longest_text, spread
from pcb_peft.data.live_heads import Head
from pcb_peft.data.models import load_tokenizer
from pcb_peft.errors import OptionError, PcbPeftError
from pcb_peft.evaluation.budget import PROBED, SHARE, parse_budget, texts_within, tokens_per_second
from pcb_peft.evaluation.cache import OutcomeCache, default_cache_directory
from pcb_peft.evaluation.harness import harness_outcomes, harness_version
from pcb_peft.evaluation.host import ModelHost
from pcb_peft.evaluation.jobs import Job, limited
from pcb_peft.evaluation.measures import outcomes_of
from pcb_peft.evaluation.runner import Runner
from pcb_peft.evaluation.scores import Score
from pcb_peft.evaluation.settings import Settings
from pcb_peft.evaluation.subjects import BASE, Subject, head_parameters
from pcb_peft.evaluation.texts import TextTask
from pcb_peft.runtime.paths import expanded
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.progress import Track, tracker
from pcb_peft.runtime.resources import working_device
from pcb_peft.version import __version__

SAMPLED = 64  # texts whose tokens are counted to estimate those of all


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One model in memory, and what it is run with.

    Attributes:
        host: The base model.
        base_digest: SHA-256 of the base model's files; None where they are not known, and nothing is cached.
        runner: Runs texts.
        cache: Keeps outcomes.
        limit: Texts per task; None for all.
        track: Shows progress.
    """

    host: ModelHost
    base_digest: str | None
    runner: Runner
    cache: OutcomeCache
    limit: int | None
    track: Track

    def score(self, subject: Subject, job: Job) -> Score:
        """The score of a subject at a task.

        Raises:
            PcbPeftError: The model, the adapter and the task do not fit each other.
        """
        if job.texts is None and job.pair.harness_task is None:
            return Score(self._measured(subject, job))
        outcomes = self._outcomes(subject, job)
        losses = job.texts is not None and job.texts.measure == "loss"
        return Score.of(outcomes, losses=losses)

    def _outcomes(self, subject: Subject, job: Job) -> list[float]:
        if self.base_digest is None:
            return self._run(subject, job)
        own = job.adapter.source if job.adapter and head_parameters(job.adapter) else None
        dequantised = " dequantised" if self.host.dequantize else ""
        key = {
            "base": self.base_digest,
            "subject": subject.digest,
            "head": own.sha256 if own else None,
            "task": job.content(self.limit),
            "class": job.task_type,
            "dtype": f"{self.host.dtype}{dequantised}",
            "device": self.host.device.type,
            "max_length": self.runner.max_length,
            "versions": versions(),
        }
        return self.cache.get(key, lambda: self._run(subject, job))

    def _run(self, subject: Subject, job: Job) -> list[float]:
        model = self._model(subject, job)
        if job.texts is not None:
            return outcomes_of(self.runner, model, job.texts)
        return harness_outcomes(
            model,
            self.runner.tokenizer,
            str(job.pair.harness_task),
            batch_size=self.runner.batch_size,
            limit=self.limit,
        )

    def _model(self, subject: Subject, job: Job) -> Any:
        head: Head | None = subject.head_for(job.adapter) if job.task_type == "SEQ_CLS" else None
        return self.host.adapted(
            job.task_type, subject.source, head, name=subject.name, checkpoint=subject.checkpoint
        )

    def _measured(self, subject: Subject, job: Job) -> float:
        """The value that a user's function returns.

        Raises:
            OptionError: It is no number, or nan or infinite.
        """
        measure: Any = job.pair.data
        model = self._model(subject, job)
        with torch.inference_mode():
            value = current().reduce(measure(model), lambda values: values[0])
        try:
            score = float(value)
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"{job.name}: the function returned {value!r}; it must return a number, the higher the better"
            ) from error
        if not math.isfinite(score):
            raise OptionError(
                f"{job.name}: the function returned {score:g} for {subject.title}; it must return a finite number, the "
                "higher the better"
            )
        return score

    def cut(self, jobs: Sequence[Job], passes: Sequence[int], budget: float | str) -> list[Job]:
        """The jobs with as many texts each as a budget allows.

        Args:
            jobs: What is to be run.
            passes: How many subjects run each job.
            budget: Time or tokens, as `parse_budget` reads it.
        """
        seconds, tokens = parse_budget(budget)
        pairs = zip(jobs, passes, strict=True)
        costs = [(self._lengths(job.texts), n) for job, n in pairs if job.texts]
        if not costs:
            return list(jobs)
        if tokens is None:
            tokens = (seconds or 0) * SHARE * self._speed(jobs)
        lengths, counts = zip(*costs, strict=True)
        count = texts_within(lengths, counts, tokens)
        return [limited(job, count) for job in jobs]

    def _lengths(self, texts: TextTask) -> list[int]:
        """About how many tokens each text takes, with all answers to choose from: the mean of some of them."""
        sample = spread(texts.rows, SAMPLED)
        counts = [len(self.runner.encode(texts.prompt(row))["input_ids"]) for row in sample]
        answers = len(texts.choices(sample[0])) if texts.measure == "choose" else 1
        return [max(1, round(answers * fmean(counts)))] * len(texts.rows)

    def _speed(self, jobs: Sequence[Job]) -> float:
        """Tokens per second of the base model on a few texts of each job; all processes agree on it."""
        few = [job for job in (limited(job, PROBED) for job in jobs) if job.texts]

        def run() -> int:
            for job in few:
                self._run(BASE, job)
            return sum(sum(self._lengths(job.texts)) for job in few if job.texts)

        run()  # loads the model
        return current().reduce(tokens_per_second(run), min)


def open_bench(base_model: str, settings: Settings) -> Bench:
    """A bench for a base model, which is not loaded yet.

    Raises:
        OptionError: There is no tokenizer, or no such device.
        BaseModelError: There is no such model.
    """
    cache = OutcomeCache(_directory(settings.cache))
    device = working_device(settings.device or default_device())
    host = ModelHost(
        base_model, dtype=settings.dtype, device=device, dequantize=settings.dequantize
    )
    tokenizer, track = settings.tokenizer or load_tokenizer(base_model), tracker(settings.progress)
    most = longest_text(host.config(), settings.max_length)
    return Bench(
        host=host,
        base_digest=base_digest(base_model, cache),
        runner=Runner(
            tokenizer, device, settings.batch_size, min(most, tokenizer.model_max_length), track
        ),
        cache=cache,
        limit=settings.limit,
        track=track,
    )


def default_device() -> torch.device:
    """A GPU if there is one: of several processes each has its own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", current().rank % torch.cuda.device_count())


def _directory(cache: bool | str | Path) -> Path | None:
    if isinstance(cache, bool):
        return default_cache_directory() if cache else None
    return Path(cache)


def base_digest(base_model: str, cache: OutcomeCache) -> str | None:
    """SHA-256 of a base model's files; None where they are not at hand."""
    from pcb_peft.base.model import open_base_model

    directory = expanded(base_model)
    try:
        if not directory.is_dir():
            directory = open_base_model(base_model, dequantize=True).directory
    except PcbPeftError:
        return None
    return cache.directory_digest(directory)


def versions() -> dict[str, str]:
    """Versions of the packages on which outcomes depend."""
    names = ("torch", "transformers", "peft")
    found = {"pcb_peft": __version__} | {name: importlib.metadata.version(name) for name in names}
    try:
        return {**found, "lm_eval": harness_version()}
    except OptionError:
        return found
