"""The evaluation in the model card of a saved merge, and beside it as JSON."""

import json
from pathlib import Path
from typing import Any

import yaml

from pcb_peft.adapters.saving import EVALUATION_FILE
from pcb_peft.errors import OutputError
from pcb_peft.evaluation.evaluation import Evaluation
from pcb_peft.evaluation.tables import markdown_table
from pcb_peft.files.json_text import read_text
from pcb_peft.files.yaml_text import load_yaml
from pcb_peft.runtime.shown import quoted, shown
from pcb_peft.writing.atomic import write_file_atomically
from pcb_peft.writing.manifest import foreign_file, update_manifest
from pcb_peft.writing.model_card import CARD

_CORRECT = "correct them, or take the card away"
BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"


def write_to_card(evaluation: Evaluation, directory: str | Path) -> None:
    """Put the table and the `model-index` metadata into README.md, and all numbers into evaluation.json.

    A table that an earlier evaluation put there is replaced.

    Args:
        evaluation: Of the merge in the directory.
        directory: Where the merge is.

    Raises:
        OutputError: There is no such directory, or it cannot be written.
    """
    directory = Path(directory)
    card = directory / CARD
    try:
        only_ours = foreign_file(directory) is None
        _replace(card, _with_table(card, evaluation))
        _replace(directory / EVALUATION_FILE, json.dumps(evaluation.as_dict(), indent=2) + "\n")
        if only_ours:
            update_manifest(directory, (CARD, EVALUATION_FILE))
    except OSError as error:
        raise OutputError(
            f"{directory}: the evaluation cannot be written into {CARD}: {error}"
        ) from error


def _with_table(card: Path, evaluation: Evaluation) -> str:
    text = read_text(card, OutputError, _CORRECT) if card.exists() else ""
    front, body = _split(text, card)
    front["model-index"] = evaluation.model_index()
    lines = [
        BEGIN,
        "## Evaluation",
        "",
        markdown_table(evaluation.tasks),
        "",
        *evaluation.summary(),
        END,
    ]
    section = "\n".join(lines)
    if BEGIN in body and END in body:
        before, rest = body.split(BEGIN, 1)
        body = before + section + rest.split(END, 1)[1]
    else:
        body = f"{body.rstrip()}\n\n{section}\n".lstrip()
    return f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---\n\n{body}"


def _split(text: str, card: Path) -> tuple[dict[str, Any], str]:
    """The metadata at the head of a card, and the rest."""
    parts = text.split("---\n", 2)
    if text.startswith("---\n") and len(parts) == 3:
        return _front(parts[1], card), parts[2].lstrip("\n")
    return {}, text


def _front(text: str, card: Path) -> dict[str, Any]:
    """The metadata of a card.

    Raises:
        OutputError: They cannot be read, and would be lost.
    """
    try:
        front = load_yaml(text) or {}
    except yaml.YAMLError as error:
        raise OutputError(
            f"{card}: the metadata at its head are no YAML ({shown(error)}); {_CORRECT}"
        ) from error
    if not isinstance(front, dict):
        raise OutputError(f"{card}: the metadata at its head are {quoted(front)}; {_CORRECT}")
    return front  # pyright: ignore[reportUnknownVariableType]


def _replace(path: Path, text: str) -> None:
    write_file_atomically(path, lambda part: part.write_text(text, "utf-8"), overwrite="all")
