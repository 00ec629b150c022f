"""Merge PEFT adapters: right, fast, and at the front of the science.

from pcb_peft import merge_adapters

merged = merge_adapters(["math-lora", "code-lora"])
merged.save_pretrained("merged")
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from pcb_peft.version import __version__

if TYPE_CHECKING:
    from pcb_peft.adapters.adapter import Adapter
    from pcb_peft.adapters.loading import fold_adapter, load_adapter
    from pcb_peft.adapters.response import responses
    from pcb_peft.adapters.source import Source
    from pcb_peft.calibrations import list_calibrations
    from pcb_peft.consumers.check import Check, check
    from pcb_peft.data.collect import collect_statistics
    from pcb_peft.data.statistics_file import TaskStatistics, open_statistics
    from pcb_peft.distillation.distill import DistilledAdapter, distill_merge
    from pcb_peft.dry_run.estimate import Estimate, estimate_merge
    from pcb_peft.errors import (
        AdapterError,
        AdapterNotFoundError,
        BaseModelError,
        MismatchError,
        OptionError,
        OutputError,
        PcbPeftError,
        ProcessError,
        UnsupportedError,
    )
    from pcb_peft.evaluation.evaluate import evaluate
    from pcb_peft.evaluation.evaluation import Evaluation
    from pcb_peft.exporting.export import Exported, export
    from pcb_peft.extraction.extract import extract_adapter
    from pcb_peft.inspection.compare import compare_adapters
    from pcb_peft.inspection.comparison import Comparison
    from pcb_peft.inspection.facts import Inspection
    from pcb_peft.inspection.inspect import inspect_adapter
    from pcb_peft.merging.engine import merge, merge_adapters
    from pcb_peft.merging.into_model import add_weighted_adapter
    from pcb_peft.merging.load_merged import load_merged
    from pcb_peft.merging.report import Report
    from pcb_peft.merging.result import MergedAdapter
    from pcb_peft.methods import MergeMethod, get_method, list_methods, merge_method
    from pcb_peft.recipes.recipe import Recipe, read_recipe
    from pcb_peft.reporting.page import write_report
    from pcb_peft.reporting.publish import Publication, publish
    from pcb_peft.runtime.processes import all_processes
    from pcb_peft.searching.result import SearchResult
    from pcb_peft.searching.search import search
    from pcb_peft.spaces import list_spaces

# The same names for Python, by module: each is imported when it is first used, because torch takes seconds to import.
_NAMES = {
    "adapters.adapter": ("Adapter",),
    "adapters.loading": ("fold_adapter", "load_adapter"),
    "adapters.response": ("responses",),
    "adapters.source": ("Source",),
    "calibrations": ("list_calibrations",),
    "consumers.check": ("Check", "check"),
    "data.collect": ("collect_statistics",),
    "data.statistics_file": ("TaskStatistics", "open_statistics"),
    "distillation.distill": ("DistilledAdapter", "distill_merge"),
    "dry_run.estimate": ("Estimate", "estimate_merge"),
    "errors": (
        "AdapterError",
        "AdapterNotFoundError",
        "BaseModelError",
        "MismatchError",
        "OptionError",
        "OutputError",
        "PcbPeftError",
        "ProcessError",
        "UnsupportedError",
    ),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.evaluation": ("Evaluation",),
    "exporting.export": ("Exported", "export"),
    "extraction.extract": ("extract_adapter",),
    "inspection.compare": ("compare_adapters",),
    "inspection.comparison": ("Comparison",),
    "inspection.facts": ("Inspection",),
    "inspection.inspect": ("inspect_adapter",),
    "merging.engine": ("merge", "merge_adapters"),
    "merging.into_model": ("add_weighted_adapter",),
    "merging.load_merged": ("load_merged",),
    "merging.report": ("Report",),
    "merging.result": ("MergedAdapter",),
    "methods": ("MergeMethod", "get_method", "list_methods", "merge_method"),
    "recipes.recipe": ("Recipe", "read_recipe"),
    "reporting.page": ("write_report",),
    "reporting.publish": ("Publication", "publish"),
    "runtime.processes": ("all_processes",),
    "searching.result": ("SearchResult",),
    "searching.search": ("search",),
    "spaces": ("list_spaces",),
}
_FORMER_NAMES = {"Statistics": "TaskStatistics"}  # understood for one release
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterNotFoundError",
    "BaseModelError",
    "Check",
    "Comparison",
    "DistilledAdapter",
    "Estimate",
    "Evaluation",
    "Exported",
    "Inspection",
    "MergeMethod",
    "MergedAdapter",
    "MismatchError",
    "OptionError",
    "OutputError",
    "PcbPeftError",
    "ProcessError",
    "Publication",
    "Recipe",
    "Report",
    "SearchResult",
    "Source",
    "TaskStatistics",
    "UnsupportedError",
    "__version__",
    "add_weighted_adapter",
    "all_processes",
    "check",
    "collect_statistics",
    "compare_adapters",
    "distill_merge",
    "estimate_merge",
    "evaluate",
    "export",
    "extract_adapter",
    "fold_adapter",
    "get_method",
    "inspect_adapter",
    "list_calibrations",
    "list_methods",
    "list_spaces",
    "load_adapter",
    "load_merged",
    "merge",
    "merge_adapters",
    "merge_method",
    "open_statistics",
    "publish",
    "read_recipe",
    "responses",
    "search",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name in _FORMER_NAMES:
        former, name = name, _FORMER_NAMES[name]
        warnings.warn(f"pcb_peft.{former} is now called {name}", DeprecationWarning, stacklevel=2)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
