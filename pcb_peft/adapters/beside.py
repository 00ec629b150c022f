"""The files beside an adapter: what they say of it, and which of them belong to it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcb_peft.errors import AdapterError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.formats.checkpoint import CONFIG

TASK = "task.json"
"""The file that lists the names of a classifier's classes: ``{"labels": ["negative", "positive"]}``."""

STATING_LABELS = (TASK, "config.json", CONFIG)


def labels_beside(directory: Path) -> tuple[str, ...]:
    """Return the names of the classes, in the order of the head's rows, that a file beside an adapter states.

    Args:
        directory: The adapter's directory.

    Returns:
        What task.json lists as ``labels``, or what config.json or the adapter's configuration maps as ``id2label``;
        empty where nothing states them.

    Raises:
        AdapterError: One of the files is damaged.
    """
    for file in STATING_LABELS:
        path = directory / file
        if not path.is_file():
            continue
        content = read_json_file(path, AdapterError, "take it away, or write it again")
        if labels := labels_in(content if isinstance(content, dict) else {}):
            return labels
    return ()


def labels_in(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes that a configuration states; those that transformers makes up are none."""
    if isinstance(listed := content.get("labels"), list):
        return tuple(map(str, listed))
    names = content.get("id2label") or {}
    if not isinstance(names, dict) or not all(str(key).isdecimal() for key in names):
        return ()
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    return () if all(name.startswith("LABEL_") for name in ordered) else ordered


def task_file(labels: Sequence[str]) -> dict[str, bytes]:
    """Return the file that lists the names of the classes; none if they are not known."""
    text = json.dumps({"labels": list(labels)}, indent=2, ensure_ascii=False)
    return {TASK: f"{text}\n".encode()} if labels else {}
