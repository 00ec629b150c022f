"""One of the ways in which PEFT stores deltas per file. A file put into this folder is on the shelf."""

import importlib
import pkgutil

from pcb_peft.formats.registry import (
    AdapterContents,
    AdapterFiles,
    Base,
    Format,
    LazyDelta,
    format_for,
    format_named,
    format_of,
)

for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)

__all__ = [
    "AdapterContents",
    "AdapterFiles",
    "Base",
    "Format",
    "LazyDelta",
    "format_for",
    "format_named",
    "format_of",
]
