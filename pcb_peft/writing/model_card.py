"""The model card of an output: Hub front matter, and what it was made of. It shows no local path."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}


def public_name(path: str | None) -> str | None:
    """A hub id as it is; None for anything that is or may be a local path."""
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
    """The text of README.md.

    Args:
        title: Heading.
        base_model: Path or hub id; a path is left out.
        task_type: PEFT's.
        tags: Beside those that the Hub derives.
        sources: Name and weight of each merged adapter.
        settings: Name and value of what was decided.
    """
    base = public_name(base_model)
    front: dict[str, Any] = {"library_name": "peft", "tags": sorted([*tags, "merge", "pcb_peft"])}
    if base:
        front |= {"base_model": base, "base_model_relation": "adapter"}
        front["tags"] = sorted([*front["tags"], f"base_model:adapter:{base}"])
    if task_type in PIPELINES:
        front["pipeline_tag"] = PIPELINES[task_type]
    lines = ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", "", f"# {title}", ""]
    if sources:
        lines += [
            "| adapter | weight |",
            "|---|---|",
            *(_row(name, weight) for name, weight in sources),
            "",
        ]
    if settings:
        lines += [
            "| setting | value |",
            "|---|---|",
            *(_row(name, value) for name, value in settings),
            "",
        ]
    return "\n".join(lines)


def _row(*cells: object) -> str:
    """Of a table, whatever stands in it."""
    words = " | ".join(str(cell).replace("|", r"\|") for cell in cells)
    return f"| {words} |"
