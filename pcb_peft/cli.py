"""Two names at the place that they had in the first release: ``pcb_peft.cli.main`` and ``pcb_peft.cli.merge``."""

from pcb_peft.commands.cli import main
from pcb_peft.merging.engine import merge

__all__ = ["main", "merge"]
