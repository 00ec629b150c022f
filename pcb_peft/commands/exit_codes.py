"""The exit status of the program: what kind of an end a command came to."""

import errno

from pcb_peft.commands.parser import UsageError
from pcb_peft.errors import NoSpaceError, PcbPeftError

DONE = 0
INTERNAL = 1
REFUSED = 2
BELOW = 3
NO_SPACE = 4
USAGE = 64  # as in sysexits.h
SIGNALLED = 128  # plus the number of the signal, as shells do
UNREAD = SIGNALLED + 13  # SIGPIPE: nobody reads the answer to its end

FULL = (errno.ENOSPC, errno.EDQUOT)
OF_THE_SYSTEM = (
    *FULL,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENXIO, errno.EBUSY, errno.ETIMEDOUT),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE),
    errno.EFBIG,  # ulimit -f
)
"""Errors whose cause is a disk, a limit or a permission, and not this program."""
MEANINGS = f"""exit status:
  {DONE}    done
  {INTERNAL}    an error of pcb-peft itself
  {REFUSED}    an input, an option or an output is refused; the message says which, and the way out
  {BELOW}    an evaluation is below --fail-below, or a program of check --for does not read the output right
  {NO_SPACE}    the disk, or a quota, is full
  {USAGE}   the command line cannot be understood
  {SIGNALLED}+  ended by a signal: 130 after Ctrl-C, 143 after SIGTERM, 141 if the reader of a pipe has gone"""


def code_of(error: PcbPeftError) -> int:
    """Return the exit status after an error."""
    if isinstance(error, UsageError):
        return USAGE
    return NO_SPACE if isinstance(error, NoSpaceError) else REFUSED
