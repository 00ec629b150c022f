"""The command line, as ``python -m pcb_peft``."""

import sys


def main() -> int:
    """Run one command; Ctrl-C while this package is imported ends it without a traceback, too."""
    try:
        from pcb_peft.commands.cli import main as run
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
