"""Links in strangers' directories that lead out of them."""

import warnings
from collections.abc import Iterable
from pathlib import Path

from pcb_peft.runtime.shown import shown

_MOST_NAMED = 3


def warn_of_links(directory: Path, paths: Iterable[Path]) -> None:
    """Warn of links that lead out of a directory: what they lead to is read, and may be copied into an output.

    The Hub's cache is one directory in this sense: its snapshots are links to its blobs.

    Args:
        directory: The directory.
        paths: What lies in it.
    """
    home = directory.resolve()
    home = next((place.parent for place in home.parents if place.name == "snapshots"), home)
    outside = [
        f"{path.relative_to(directory)} to {path.readlink()}"
        for path in paths
        if path.is_symlink() and not _leads_into(path, home)
    ]
    if outside:
        more = f" and {len(outside) - _MOST_NAMED} more" if len(outside) > _MOST_NAMED else ""
        warnings.warn(
            f"{directory} holds links that lead out of it ({shown(', '.join(outside[:_MOST_NAMED]))}{more}): what they "
            "lead to is read, and copied where such files are; look whether that is meant",
            stacklevel=3,
        )


def _leads_into(link: Path, home: Path) -> bool:
    try:
        return link.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # links in a circle lead nowhere
        return True
