"""Paths as users write them: the home directory, and suggestions for misspelt names."""

import difflib
from pathlib import Path


def similar_path(path: str) -> str:
    """Suggest an existing path for one that does not exist.

    Returns:
        ``; did you mean ./code-lora?``, or nothing if there is no similar name in the same directory.
    """
    missing = expanded(path)
    try:
        names = {entry.name.lower(): entry.name for entry in missing.parent.iterdir()}
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name.lower(), names, n=1)
    if not close or missing.exists():
        return ""
    found = missing.with_name(names[close[0]])
    return f"; did you mean {found if missing.is_absolute() else f'./{found}'}?"


def expanded(path: str | Path) -> Path:
    """Return a path with ``~`` and ``~user`` replaced; where there is no such user, the path as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
