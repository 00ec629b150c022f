"""Merge PEFT adapters: right, fast, and at the front of the science.

from pcb_peft import merge_adapters

merged = merge_adapters(["math-lora", "code-lora"], method="pcb")
merged.save_pretrained("merged")
"""

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import fold_adapter, load_adapter
from pcb_peft.adapters.source import Source
from pcb_peft.calibrations import list_calibrations
from pcb_peft.data.collect import collect_statistics
from pcb_peft.data.statistics_file import TaskStatistics, open_statistics
from pcb_peft.dry_run.estimate import Estimate, estimate_merge
from pcb_peft.errors import (
    AdapterError,
    BaseModelError,
    MismatchError,
    OptionError,
    OutputError,
    PcbPeftError,
    ProcessError,
    UnsupportedError,
)
from pcb_peft.extraction.extract import extract_adapter
from pcb_peft.merging.engine import merge, merge_adapters
from pcb_peft.merging.into_model import add_weighted_adapter
from pcb_peft.merging.report import Report
from pcb_peft.merging.result import MergedAdapter
from pcb_peft.methods import MergeMethod, get_method, list_methods, merge_method
from pcb_peft.recipes.recipe import Recipe, read_recipe
from pcb_peft.runtime.processes import all_processes
from pcb_peft.spaces import list_spaces
from pcb_peft.version import __version__

__all__ = [
    "Adapter",
    "AdapterError",
    "BaseModelError",
    "Estimate",
    "MergeMethod",
    "MergedAdapter",
    "MismatchError",
    "OptionError",
    "OutputError",
    "PcbPeftError",
    "ProcessError",
    "Recipe",
    "Report",
    "Source",
    "TaskStatistics",
    "UnsupportedError",
    "__version__",
    "add_weighted_adapter",
    "all_processes",
    "collect_statistics",
    "estimate_merge",
    "extract_adapter",
    "fold_adapter",
    "get_method",
    "list_calibrations",
    "list_methods",
    "list_spaces",
    "load_adapter",
    "merge",
    "merge_adapters",
    "merge_method",
    "open_statistics",
    "read_recipe",
]
