"""One system of coordinates per file. A file put into this folder is on the shelf."""

import importlib
import pkgutil

from pcb_peft.spaces.parts import in_parts
from pcb_peft.spaces.registry import Projection, Space, get_space, list_spaces, space

for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)

__all__ = ["Projection", "Space", "get_space", "in_parts", "list_spaces", "space"]
