"""One published algorithm per file. A file put into this folder is on the shelf."""

import importlib
import pkgutil

from pcb_peft.methods.registry import MergeMethod, get_method, list_methods, merge_method

for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)

__all__ = ["MergeMethod", "get_method", "list_methods", "merge_method"]
