"""One calibration per file, before or after a merge. A file put into this folder is on the shelf."""

import importlib
import pkgutil

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

for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)

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
