"""The model card of an output: front matter for the Hub, and tables of sources and settings, without local paths."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}
"""PEFT's task type to the Hub's name of the pipeline."""


def public_name(path: str | None) -> str | None:
    """Return a hub id as it is; None for anything that is or may be a local path."""
    if path is None or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        return None
    return None if Path(path).exists() else path


def model_card(
    *,
    title: str,
    base_model: str | None,
    task_type: str | None,
    tags: Sequence[str],
    sources: Sequence[tuple[str, object]],
    settings: Sequence[tuple[str, Any]],
) -> str:
    """Return the text of README.md.

    Args:
        title: Heading.
        base_model: Path or hub id; a path is left out.
        task_type: PEFT's task type.
        tags: Tags beside those that every output has.
        sources: Name and weight of each merged adapter.
        settings: Name and value of each choice of the merge.
    """
    from huggingface_hub import ModelCardData  # only when something is saved

    base = public_name(base_model)
    base_tags = [f"base_model:adapter:{base}"] if base else []
    front = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="peft",
        pipeline_tag=PIPELINES.get(str(task_type)),
        tags=sorted([*tags, "merge", "pcb_peft", *base_tags]),
    )
    lines = ["---", front.to_yaml(), "---", "", f"# {title}", ""]
    if sources:
        lines += [*_table(("adapter", "weight"), sources), ""]
    if settings:
        lines += [*_table(("setting", "value"), settings), ""]
    return "\n".join(lines)


def _table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    return [_row(heading), "|" + "---|" * len(heading), *map(_row, rows)]


def _row(cells: Sequence[object]) -> str:
    escaped = [str(cell).replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
