"""The command line under the name that its module had in the first release: ``pcb_peft.cli.main``."""

from pcb_peft.commands.cli import main
from pcb_peft.merging.engine import merge

__all__ = ["main", "merge"]
