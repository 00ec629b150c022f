"""``python -m pcb_peft``: the command line."""

import sys

from pcb_peft.commands.cli import main

sys.exit(main())
