"""The command line, as ``python -m pcb_peft``."""

import sys

from pcb_peft.commands.cli import main

sys.exit(main())
