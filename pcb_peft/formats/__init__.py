"""PEFT's formats, one file each: how deltas are stored. A file in this folder is registered by being imported."""

from pcb_peft.formats.base_weights import Base, BaseWeight, Weights, base_weight
from pcb_peft.formats.lazy_delta import (
    AdapterContents,
    AdapterFiles,
    LazyDelta,
    as_dense,
    in_memory,
    is_vector,
    vector_delta,
)
from pcb_peft.formats.registry import (
    Format,
    Writer,
    format_for,
    format_of,
    list_formats,
    writer_named,
)
from pcb_peft.plugins.registry import import_files

import_files(__path__, __name__)

__all__ = [
    "AdapterContents",
    "AdapterFiles",
    "Base",
    "BaseWeight",
    "Format",
    "LazyDelta",
    "Weights",
    "Writer",
    "as_dense",
    "base_weight",
    "format_for",
    "format_of",
    "in_memory",
    "is_vector",
    "list_formats",
    "vector_delta",
    "writer_named",
]
