"""Paths as users write them: the home directory, and suggestions for misspelt names."""

import difflib
import errno
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from pcb_peft.errors import OptionError
from pcb_peft.runtime.shown import quoted, shown

_LONGEST = 100  # characters of a portable name
_UNPORTABLE = re.compile(r"[^\w.-]", re.ASCII)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # on Windows


def similar_path(path: str) -> str:
    """Suggest an existing path for one that does not exist.

    Returns:
        ``did you mean ./code-lora?``, or nothing if there is no similar name in the same directory.
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
    return f"did you mean {found if missing.is_absolute() else f'./{found}'}?"


def cache_directory(name: str) -> Path:
    """Return a directory of the user's cache: ``$XDG_CACHE_HOME/pcb_peft/<name>``; it need not exist.

    Raises:
        OptionError: The user has no home directory.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise OptionError(
            "there is no home directory for the cache; set XDG_CACHE_HOME (or HOME) to a directory"
        ) from error
    return root / "pcb_peft" / name


def size_on_disk(path: Path) -> int:
    """Return the size of a file, or of a directory's files, in bytes; 0 for what does not exist."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def current_directory() -> Path | None:
    """Return the current directory; None if it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def why_unreadable(path: Path, error: Exception) -> str:
    """Return why a file cannot be opened: safetensors calls one that is not there what may not be read."""
    if path.exists() and not os.access(path, os.R_OK):
        return os.strerror(errno.EACCES)
    return shown(error)


def is_file(path: Path) -> bool:
    """Return whether a path is that of a file; False for one that cannot be a path (too long, a zero byte)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def expanded(path: str | Path) -> Path:
    """Return a path with ``~`` and ``~user`` replaced; where there is no such user, the path as it is.

    Raises:
        OptionError: No file can have it.
    """
    try:
        written = Path(path).expanduser()
    except RuntimeError:
        written = Path(path)
    try:
        written.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return written
    except (OSError, ValueError) as error:  # a name that is too long, a zero byte, half a character
        raise OptionError(
            f"{quoted(str(path))} cannot be a path ({shown(error)}); give that of a file or a directory"
        ) from error
    return written


def portable_names(names: Iterable[str]) -> dict[str, str]:
    """Return a name for a file, without an ending, for each of some names: one that every system can store.

    A name that is one already stays as it is. Others keep what they can, and end with a part of their SHA-256.

    >>> portable_names(["math", "team/math"])
    {'math': 'math', 'team/math': 'team_math-7f4daffa'}
    """
    files: dict[str, str] = {}
    for name in names:
        plain = _UNPORTABLE.sub("_", name)[:_LONGEST].strip("._ -") or "_"
        taken = {file.casefold() for file in files.values()}
        if plain != name or _RESERVED.fullmatch(plain) or plain.casefold() in taken:
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
            plain = f"{_RESERVED.sub('_', plain)}-{digest[:8]}"
        files[name] = plain
    return files
