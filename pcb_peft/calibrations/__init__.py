"""Calibrations before or after a merge, one per file. A file in this folder is registered by being imported."""

from pcb_peft.calibrations.registry import (
    Calibration,
    Survey,
    When,
    after,
    before,
    bound,
    get_calibration,
    list_calibrations,
    prepared,
)
from pcb_peft.plugins.registry import import_files

import_files(__path__, __name__)

__all__ = [
    "Calibration",
    "Survey",
    "When",
    "after",
    "before",
    "bound",
    "get_calibration",
    "list_calibrations",
    "prepared",
]
