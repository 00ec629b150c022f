"""The adapters of a pool, with the texts that each is measured on."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

from domains import domains
from texts import Row, task_named

from pcb_peft import Adapter, extract_adapter, load_adapter

RENAMED = {"find creative work": "search creative work"}
"""Labels of adapters that the texts have by another name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cohort:
    """Adapters of one base model.

    Attributes:
        name: What tables call them.
        base: The base model.
        folders: One per adapter, with its `task.json`; their names are those of the adapters.
        causal: True if the base model is a language model.
    """

    name: str
    base: Path
    folders: tuple[Path, ...]
    causal: bool

    @classmethod
    def of(cls, name: str, directory: Path, base: Path) -> "Cohort":
        """Return the cohort in a directory with a folder per adapter.

        Raises:
            SystemExit: There is none.
        """
        folders = tuple(sorted(file.parent for file in directory.glob("*/task.json")))
        if len(folders) < 2:
            raise SystemExit(f"{directory}: a pool has at least two folders with a task.json")
        config = json.loads((base / "config.json").read_text("utf-8"))
        stated = (config.get("architectures") or [""])[0]
        return cls(name, base, folders, stated.endswith("ForCausalLM"))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(folder.name for folder in self.folders)

    def adapters(self, names: tuple[str, ...]) -> list[Adapter]:
        """Read some of the adapters; a fine-tune of all weights becomes one."""
        return [self._adapter(folder) for folder in self.folders if folder.name in names]

    def _adapter(self, folder: Path) -> Adapter:
        if (folder / "adapter_config.json").is_file():
            return load_adapter(folder)
        return dataclasses.replace(extract_adapter(folder, self.base), name=folder.name)

    def data(self, names: tuple[str, ...], split: str) -> dict[str, list[Row]]:
        """Read a split of the texts of some adapters, by the adapter's name."""
        return {
            folder.name: self._rows(folder, split)
            for folder in self.folders
            if folder.name in names
        }

    @functools.cache  # noqa: B019  (a handful of cohorts per process)
    def _rows(self, folder: Path, split: str) -> list[Row]:
        content: dict[str, Any] = json.loads((folder / "task.json").read_text("utf-8"))
        task = task_named(content.get("task", folder.name))
        rows = task.rows(split, as_prompts=self.causal)
        if part := content.get("part"):
            found = domains(rows, task.name, self.base, part[1])
            rows = [row for row, domain in zip(rows, found, strict=True) if domain == part[0]]
        names = {RENAMED[label]: label for label in content["labels"] or () if label in RENAMED}
        return [_renamed(row, names) for row in rows]


def _renamed(row: Row, names: dict[str, str]) -> Row:
    return {**row, "label": names.get(row["label"], row["label"])} if "label" in row else row


def all_but_one(names: tuple[str, ...]) -> list[tuple[tuple[str, ...], tuple[str]]]:
    """Return, for each adapter, all others and the one that is left out."""
    return [(tuple(name for name in names if name != one), (one,)) for one in names]


def subsets(names: tuple[str, ...], count: int | None, limit: int) -> list[tuple[str, ...]]:
    """Return sets of so many of the adapters, at most `limit` of them, evenly spread.

    Args:
        names: All adapters.
        count: How many in a set; None: all of them.
        limit: How many sets.
    """
    if count is None or count >= len(names):
        return [names] if count in (None, len(names)) else []
    everything = list(itertools.combinations(names, count))
    wanted = min(limit, len(everything))
    return [everything[n * len(everything) // wanted] for n in range(wanted)]
