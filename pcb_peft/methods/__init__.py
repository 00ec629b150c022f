"""Merge methods, one published algorithm per file. A file in this folder is registered by being imported."""

from pcb_peft.methods.registry import MergeMethod, get_method, list_methods, merge_method
from pcb_peft.plugins.registry import import_files

import_files(__path__, __name__)

__all__ = ["MergeMethod", "get_method", "list_methods", "merge_method"]
