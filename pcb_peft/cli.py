"""The command line under the name that its module had in the first release: ``pcb_peft.cli.main``."""

from pcb_peft.commands.cli import main

__all__ = ["main"]
