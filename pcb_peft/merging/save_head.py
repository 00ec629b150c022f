"""Saving a merged adapter again, with the head of one task as its own."""

import dataclasses
import json
from pathlib import Path

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.beside import TASK, task_file
from pcb_peft.adapters.loading import load_adapter
from pcb_peft.adapters.own_head import files_with_head
from pcb_peft.adapters.saving import REPORT_FILE
from pcb_peft.adapters.source import OpenedAdapter, Source
from pcb_peft.deltas.replacements import HEADS
from pcb_peft.errors import OptionError
from pcb_peft.formats.checkpoint import CONFIG, PICKLE, SAFETENSORS
from pcb_peft.merging.card import RECIPE, recipe_section
from pcb_peft.merging.heads import notes_with_head
from pcb_peft.merging.report_file import read_report, report_json
from pcb_peft.recipes.recipe import FILE_NAME, read_recipe
from pcb_peft.writing.atomic import copy_file, replace_directory, write_files
from pcb_peft.writing.manifest import MANIFEST
from pcb_peft.writing.model_card import CARD, model_card
from pcb_peft.writing.targets import Overwrite, writing
from pcb_peft.writing.tensors_file import save_tensors

_REPLACED = {CONFIG, SAFETENSORS, PICKLE, HEADS, CARD, FILE_NAME, TASK, MANIFEST}


def save_with_head(
    adapter: str | Path | Source, head: str, directory: str | Path, *, overwrite: Overwrite = False
) -> Adapter:
    """Write a merged adapter again, with one of the heads beside it as its own, so that PEFT loads the two together.

    The deltas are copied as they are, and so are the files beside them. The heads of other tasks are left out.

    Args:
        adapter: Directory or hub id of the merged adapter.
        head: The adapter whose head it is: the name of a file in the folder ``heads``.
        directory: Directory to write, whole or not at all.
        overwrite: Replace a directory that is not empty: True, if this package wrote it; "all", anything.

    Returns:
        The adapter with that head.

    Raises:
        OptionError: There is no head of that name.
        OutputError: The directory cannot be written.

    Example:
        save_with_head("merged", "subj", "merged-subj")
    """
    loaded = load_adapter(adapter)
    opened = loaded.files
    if opened is None or opened.directory is None:
        raise OptionError(
            f"{loaded.name} is no directory with a merged adapter, and has no heads beside it"
        )
    content = files_with_head(loaded, opened, head)
    headed = loaded.with_head(head)
    files = _described(headed, opened, head) | {
        CONFIG: (json.dumps(content.config, indent=2, sort_keys=True) + "\n").encode()
    }
    replaced = replace_directory(Path(directory), overwrite=overwrite, inputs=headed.inputs)
    with replaced as target:
        for path in sorted(opened.directory.iterdir()):
            if path.is_file() and path.name not in _REPLACED:
                copy_file(path, target / path.name)
        write_files(target, headed.companion_files())
        with writing(Path(directory)):
            save_tensors(content.tensors, target / content.file, {"format": "pt"})
        write_files(target, files)
    return headed


def _described(headed: Adapter, opened: OpenedAdapter, head: str) -> dict[str, bytes]:
    """Return the model card and, where there are some, the recipe and the report: each names the head."""
    peft_type = str(opened.config["peft_type"])
    files = task_file(headed.head.task.labels)
    title, facts, sections = headed.card_parts()
    recipe = opened.directory / FILE_NAME if opened.directory else Path(FILE_NAME)
    if recipe.is_file():
        again = dataclasses.replace(read_recipe(recipe), head=head)
        files[FILE_NAME] = again.to_yaml().encode()
        if (report := read_report(recipe.parent, again)) is not None:
            notes = notes_with_head(report.notes, head, headed.head.modules)
            report = dataclasses.replace(report, notes=notes)
            files[REPORT_FILE] = report_json(report, again, headed.inputs).encode()
        sections |= {RECIPE: recipe_section(again)}
    facts = dataclasses.replace(facts, tags=headed.tags(peft_type))
    return files | {CARD: model_card(title, facts, sections).encode()}
