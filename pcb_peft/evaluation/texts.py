"""A task that is measured on texts: its rows, how they are measured, and labels that must fit the head."""

import dataclasses
import difflib
import math
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.base.canonical import LANGUAGE_MODELS
from pcb_peft.data.batches import Row, read_rows, spread
from pcb_peft.errors import OptionError
from pcb_peft.evaluation.cache import digest_of
from pcb_peft.runtime.shown import quoted

MEASURES = {
    "head": "accuracy of the classification head",
    "choose": "accuracy of the most likely answer, among those of the task",
    "nearest": "zero-shot accuracy of an encoder: the label whose name is nearest to the text, by their embeddings",
    "exact": "share of generated answers that are right to the letter",
    "loss": "1/perplexity of the answers, or of the texts where there are none",
}
"""How a task can be measured, beside a function of the user's and lm-evaluation-harness."""

METRIC = {
    "head": "accuracy",
    "choose": "accuracy",
    "nearest": "accuracy",
    "exact": "exact match",
    "loss": "1/perplexity",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextTask:
    """Texts with their answers.

    Attributes:
        name: The task's name.
        rows: The texts, each with `text` or `prompt`, and if wanted `text_pair`, `label`, `answer`, `choices`.
        measure: A key of `MEASURES`.
        labels: Names of the classes in the order of the head's rows, or the answers to choose from.
        separator: What stands between a prompt and its answer.
        length_normalised: Choose the answer by its likelihood per token.
    """

    name: str
    rows: tuple[Row, ...]
    measure: str
    labels: tuple[str, ...] = ()
    separator: str = " "
    length_normalised: bool = False

    def first(self, count: int | None) -> "TextTask":
        """The same task with at most so many texts, evenly spread: a file may be sorted by label.

        Where labels take turns, evenly spread texts may all have the same one; then they are drawn at random.
        """
        rows = spread(self.rows, count)
        if not _has_like_labels(rows, self.rows):
            places = random.Random(0).sample(range(len(self.rows)), len(rows))
            rows = tuple(self.rows[place] for place in sorted(places))
        return dataclasses.replace(self, rows=rows)

    def digest(self) -> str:
        """SHA-256 of all that the task's outcomes depend on."""
        return digest_of(
            {
                "rows": [dict(row) for row in self.rows],
                "measure": self.measure,
                "labels": self.labels,
                "separator": self.separator,
                "length_normalised": self.length_normalised,
            }
        )

    def chance(self) -> float:
        """Return the score of a guess; 0 where answers are written, or losses measured."""
        if self.measure in ("exact", "loss"):
            return 0.0
        return fmean(1 / max(1, len(self.choices(row))) for row in self.rows)

    def class_of(self, row: Row) -> int:
        """The row of the head that is the right class."""
        return self.labels.index(str(row["label"]))

    def prompt(self, row: Row) -> str:
        """The text that a language model reads before it answers."""
        return str(row.get("prompt", row.get("text")))

    def answer(self, row: Row) -> str | None:
        """The right answer of a language model's row."""
        answer = row.get("answer", row.get("label"))
        return None if answer is None else str(answer)

    def choices(self, row: Row) -> Sequence[str]:
        """The answers to choose from."""
        return tuple(map(str, row["choices"])) if "choices" in row else self.labels


def _has_like_labels(some: Sequence[Row], rows: Sequence[Row]) -> bool:
    """True if each frequent label has about the same share of some rows as of all, as in a random sample."""
    taken, given = (Counter(row.get("label", row.get("answer")) for row in r) for r in (some, rows))
    shares = {label: count / len(rows) for label, count in given.items()}
    return all(
        abs(taken[label] / len(some) - share)
        <= UNLIKELY * math.sqrt(share * (1 - share) / len(some))
        for label, share in shares.items()
        if share * len(some) >= FREQUENT
    )


UNLIKELY = 4  # standard errors between the share of a label in a sample and in all rows
FREQUENT = 5  # rows of a label that a sample should have, for its share to be judged


Rows: TypeAlias = str | Path | Sequence[Any]
"""A ``.jsonl`` file, or rows."""


def read_task(  # noqa: PLR0913  (every choice, by name)
    name: str,
    data: Rows,
    *,
    adapter: Adapter | None,
    task_type: str,
    classes: int | None,
    measure: str = "auto",
    labels: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    length_normalised: bool = False,
) -> TextTask:
    """Read a task's texts, and settle how they are measured.

    Args:
        name: The task's name.
        data: A ``.jsonl`` file, or rows.
        adapter: The task's own adapter, whose folder may name the labels.
        task_type: PEFT's, such as SEQ_CLS.
        classes: How many rows the head has; None without a head.
        measure: A key of `MEASURES`, or "auto": "head" where there is one, else by what the rows have.
        labels: Names of the classes, or the answers to choose from.
        rename: Labels of the data to the names that the head knows.
        length_normalised: Choose an answer by its likelihood per token.

    Raises:
        OptionError: Rows that cannot be measured so, or labels that the head does not know.
    """
    rows = [_renamed(row, rename or {}) for row in _rows(name, data)]
    chosen = _measure(name, rows, measure, task_type, classes)
    known: Sequence[str] = ()
    if chosen == "head":
        known = _head_labels(name, rows, adapter, labels, classes or 0)
        _check_labels(name, rows, known)
    elif chosen == "choose":
        known = labels or _answers(rows)
        _check_choices(name, rows, known)
    elif chosen == "nearest":
        known = labels or adapter_labels(adapter) or _answers(rows)
        _check_labels(name, rows, known)
    return TextTask(
        name=name,
        rows=tuple(rows),
        measure=chosen,
        labels=tuple(known),
        length_normalised=length_normalised,
    )


def _rows(name: str, data: Rows) -> list[Row]:
    try:
        return read_rows(data, ("text", "prompt"))
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from error


def _renamed(row: Row, rename: Mapping[str, str]) -> Row:
    """The row with the labels that the head knows; what is null is not there."""
    return {
        key: rename.get(value, value) if key in ("label", "answer") else value
        for key, value in row.items()
        if value is not None
    }


def _measure(
    name: str, rows: Sequence[Row], measure: str, task_type: str, classes: int | None
) -> str:
    """The measure for the rows.

    Raises:
        OptionError: They cannot be.
    """
    has = {key for row in rows for key in row}
    language_model = task_type in LANGUAGE_MODELS
    if measure == "auto":
        measure = _suiting(has, language_model, classes)
    if measure == "head" and classes is None:
        raise OptionError(
            f"{name}: there is no classification head, neither in the adapter (modules_to_save) nor in the merge; give "
            "an adapter that was saved with its head"
        )
    _check_model(name, measure, language_model)
    needed = NEEDED[measure]
    if measure == "loss" and task_type == "SEQ_2_SEQ_LM":  # what it reads is not what it writes
        needed = NEEDED["exact"]
    for keys in needed:
        _check_every(name, rows, measure, keys)
    if measure == "choose" and "choices" in has:
        _check_every(name, rows, measure, ("choices",))
    return measure


NEEDED: Mapping[str, Sequence[tuple[str, ...]]] = {
    "head": [("text",), ("label",)],
    "nearest": [("text",), ("label",)],
    "choose": [("label", "answer")],
    "exact": [("label", "answer")],
    "loss": [],
}
"""What every row must have for a measure: one key of each of these."""


def _check_every(name: str, rows: Sequence[Row], measure: str, keys: tuple[str, ...]) -> None:
    """Refuse rows without any of some keys.

    Raises:
        OptionError: There are some; the message says how many, and shows the first one.
    """
    lacking = [n for n, row in enumerate(rows, 1) if not any(key in row for key in keys)]
    if lacking:
        words = " or ".join(f"`{key}`" for key in keys)
        first = quoted(dict(rows[lacking[0] - 1]))
        raise OptionError(
            f"{name}: {len(lacking)} of {len(rows)} rows have no {words}, such as row {lacking[0]}: {first}; every row "
            f"needs it for the measure {measure} ({MEASURES[measure]})"
        )


def _suiting(has: Collection[str], language_model: bool, classes: int | None) -> str:
    """The measure that suits what rows have."""
    if not language_model and (classes is not None or "label" in has):
        return "head" if classes is not None else "nearest"
    if "label" in has or "choices" in has:
        return "choose"
    return "exact" if "answer" in has else "loss"


def _check_model(name: str, measure: str, language_model: bool) -> None:
    """Refuse a measure that the model is not made for.

    Raises:
        OptionError: It is not.
    """
    if measure not in ("head", "nearest") and not language_model:
        raise OptionError(
            f"{name}: the base model is an encoder, which writes nothing, and the measure {measure} is for language "
            "models: give rows with a `label`, without --measure (measure=…), or a function that measures"
        )
    if measure == "nearest" and language_model:
        raise OptionError(
            f"{name}: the measure nearest is for encoders; a language model chooses by likelihood (choose)"
        )


def _head_labels(
    name: str,
    rows: Sequence[Row],
    adapter: Adapter | None,
    labels: Sequence[str] | None,
    classes: int,
) -> Sequence[str]:
    """Names of the classes in the order of the head's rows.

    Raises:
        OptionError: Nobody says which they are.
    """
    known = labels or adapter_labels(adapter)
    if labels:
        _check_count(name, labels, classes)
    data = {str(row["label"]) for row in rows}
    numbered = [tuple(form.format(n) for n in range(classes)) for form in ROW_NUMBERS]
    fitting = [names for names in (known, *numbered) if data <= set(names)]
    if fitting and fitting[0] is not known:
        return fitting[0]
    if not known:
        given = sorted(data)
        raise OptionError(
            f"{name}: the head has {classes} rows, and neither task.json nor config.json beside the adapter says which "
            f"class is which; give the names in the order of the rows. The data has {', '.join(given)}: in this order "
            f"if the adapter was trained on sorted labels (labels={{{quoted(name)}: {given}}})"
        )
    _check_count(name, known, classes)
    return known


def _check_count(name: str, known: Sequence[str], classes: int) -> None:
    """Raises OptionError where there are not as many names as classes."""
    if len(known) != classes:
        raise OptionError(
            f"{name}: there are {len(known)} labels ({', '.join(known)}), and the head has {classes} rows"
        )


ROW_NUMBERS = ("{}", "LABEL_{}")
"""Labels that number the rows of a head, from 0: plain numbers, and the names that transformers makes up."""


def adapter_labels(adapter: Adapter | None) -> Sequence[str]:
    """Names of the classes of an adapter's head, as far as they are known."""
    return () if adapter is None else adapter.head.task.labels


def _check_labels(name: str, rows: Sequence[Row], known: Sequence[str]) -> None:
    """Refuse labels that the head does not know: to number them anew would score the wrong classes.

    Raises:
        OptionError: There are some; the message says which, and what may be meant.
    """
    data = {str(row["label"]) for row in rows}
    unknown, unused = sorted(data - set(known)), sorted(set(known) - data)
    if not unknown:
        return
    pairs = _likely(unknown, unused)
    hint = " ".join(f'"{label}={meant}"' for label, meant in pairs.items())
    raise OptionError(
        f"{name}: the data has labels that the adapter does not know: {', '.join(unknown)}. It knows "
        f"{', '.join(known)}"
        + (
            f"; perhaps rename={pairs} (--rename {hint})"
            if pairs
            else "; rename them (rename={…}, --rename DATA=HEAD), or give labels in the order of the head's rows"
        )
    )


def _likely(unknown: Sequence[str], unused: Sequence[str]) -> dict[str, str]:
    """Guess, for each unknown label, the label of the head that it may mean."""
    if len(unknown) == len(unused) == 1:
        return {unknown[0]: unused[0]}
    pairs: dict[str, str] = {}
    for label in unknown:
        near = difflib.get_close_matches(label, [x for x in unused if x not in pairs.values()], 1)
        if near:
            pairs[label] = near[0]
    return pairs


def _answers(rows: Sequence[Row]) -> list[str]:
    """All answers of the data, in sorted order."""
    return sorted({str(row.get("answer", row.get("label"))) for row in rows})


def _check_choices(name: str, rows: Sequence[Row], known: Sequence[str]) -> None:
    for place, row in enumerate(rows, 1):
        answer = str(row.get("answer", row.get("label")))
        choices = [str(choice) for choice in row.get("choices", known)]
        if answer not in choices:
            raise OptionError(
                f"{name}: row {place} has the answer {quoted(answer)}, which is not one of its choices "
                f"{quoted(choices)}; mend the row"
            )
