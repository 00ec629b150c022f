"""All that a page tells of a merge: from the merge in memory, or from the files that were saved with it."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapter
from pcb_peft.adapters.saving import REPORT_FILE
from pcb_peft.errors import AdapterError, AdapterNotFoundError
from pcb_peft.merging.card import public_recipe
from pcb_peft.merging.evaluation_file import Measured, checked_evaluation, read_evaluation
from pcb_peft.merging.report import Report
from pcb_peft.merging.report_file import read_report, without_paths
from pcb_peft.merging.result import MergedAdapter
from pcb_peft.recipes.recipe import FILE_NAME, Recipe, read_recipe
from pcb_peft.runtime.paths import expanded
from pcb_peft.writing.model_card import public_name


class MergeRecord(NamedTuple):
    """A merge, and how it was made.

    Attributes:
        report: Its report.
        recipe: Its recipe.
        base_model: Path or hub id of its base model.
        merged: Its deltas; None where they are in the weights of a model.
        evaluation: What was measured, if anything was.
    """

    report: Report
    recipe: Recipe
    base_model: str | None
    merged: Adapter | None
    evaluation: Measured | None

    def public(self) -> "MergeRecord":
        """Return what others may see: no local path."""
        named = (
            *(one.path for one in self.recipe.adapters),
            self.recipe.base_model,
            self.base_model,
        )
        local = {path for path in named if path and not public_name(path)}
        notes = tuple(without_paths(note, local) for note in self.report.notes)
        return self._replace(
            report=dataclasses.replace(self.report, notes=notes),
            recipe=public_recipe(self.recipe),
            base_model=public_name(self.base_model),
        )


def record_of(merged: MergedAdapter | str | Path, evaluation: Any = None) -> MergeRecord:
    """Return what is known of a merge.

    Args:
        merged: The merge, or the directory in which it was saved.
        evaluation: What `evaluate` returned; default: what it wrote into the directory.

    Raises:
        AdapterError: There is no report in the directory, or one of the files is damaged.
        OptionError: Its recipe is damaged.
    """
    measured = (
        None if evaluation is None else checked_evaluation(evaluation.as_dict(), "the evaluation")
    )
    if isinstance(merged, MergedAdapter):
        return MergeRecord(merged.report, merged.recipe, merged.base_model, merged, measured)
    place = expanded(merged)
    known = place.is_dir() and (place / FILE_NAME).is_file()
    recipe = read_recipe(place / FILE_NAME) if known else None
    report = read_report(place, recipe) if known else None
    if report is None or recipe is None:
        raise AdapterError(
            f"{merged} holds no {REPORT_FILE} and {FILE_NAME} of a merge: name a directory that pcb-peft merge wrote"
        )
    measured = measured or read_evaluation(place)
    try:
        adapter = load_adapter(place, hashed=False)
    except AdapterNotFoundError:  # folded
        return MergeRecord(report, recipe, recipe.base_model, None, measured)
    base = adapter.base_model or recipe.base_model
    return MergeRecord(report, recipe, base, adapter, measured)
