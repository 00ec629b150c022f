"""Spaces, one system of coordinates per file. A file in this folder is registered by being imported."""

from pcb_peft.plugins.registry import import_files
from pcb_peft.spaces.in_metric import in_metric
from pcb_peft.spaces.parts import in_parts
from pcb_peft.spaces.registry import Projection, Space, get_space, list_spaces, space

import_files(__path__, __name__)

__all__ = ["Projection", "Space", "get_space", "in_metric", "in_parts", "list_spaces", "space"]
