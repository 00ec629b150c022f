"""The texts of eight tasks, as they are shipped in ``texts/``; its README says where they come from."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "texts"
SPLITS = ("train", "validation", "test")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: Its name.
        labels: Its classes, in the order of a head's rows; None where the answer is a text.
        prompt: How a language model is asked.
    """

    name: str
    labels: tuple[str, ...] | None
    prompt: str

    def rows(self, split: str, *, as_prompts: bool) -> list[Row]:
        """Read a split.

        Args:
            split: train, validation or test.
            as_prompts: For a language model, with `prompt` and `answer`; else for a head, with `text` and `label`.
        """
        with gzip.open(FOLDER / self.name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        return [self._row(row, as_prompts) for row in rows]

    def _row(self, row: Row, as_prompts: bool) -> Row:
        answer = row.pop("answer")
        if not as_prompts:
            return {**row, "label": answer}
        return {
            "prompt": self.prompt.format(**row),
            "answer": answer,
            **({"label": answer} if self.labels else {}),
        }


def task_named(name: str) -> Task:
    """Return a task by its name."""
    content = json.loads((FOLDER / name / "task.json").read_text(encoding="utf-8"))
    return Task(name, content["labels"] and tuple(content["labels"]), content["prompt"])
