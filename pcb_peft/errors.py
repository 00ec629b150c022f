"""Every exception that this package raises on purpose.

PcbPeftError
├── AdapterError            an adapter cannot be read as it stands: a file, a configuration, a tensor
│   ├── AdapterNotFoundError    ... there is none, or a file of it is missing; also a FileNotFoundError
│   └── UnsupportedError        ... it is well-formed, and holds something that is not supported; also a ValueError
├── MismatchError           adapters do not fit each other, or the base model; also a ValueError
├── BaseModelError          a base model is missing, needed, or not in a readable form
├── OptionError             a value from a caller or a recipe is not allowed; also a ValueError
├── OutputError             an output cannot be written; also an OSError
│   └── NoSpaceError            ... because the disk, or a quota, is full
└── ProcessError            another process of the merge stopped

Code written for PEFT, which raises ValueError and OSError, catches these too.
"""

_MOST = 2500  # characters of a message
_END = 500  # of which the last ones hold the way out


class PcbPeftError(Exception):
    """Base class of all errors of this package; the middle of a very long message is left out."""

    def __str__(self) -> str:
        message = super().__str__()
        if len(message) <= _MOST:
            return message
        return f"{message[: _MOST - _END]} … {message[-_END:]}"


class AdapterError(PcbPeftError):
    """An adapter cannot be read as it stands."""


class AdapterNotFoundError(AdapterError, FileNotFoundError):
    """An adapter, or a file of it, is not there."""


class UnsupportedError(AdapterError, ValueError):
    """An adapter is well-formed and holds something that is not supported."""


class MismatchError(PcbPeftError, ValueError):
    """Adapters do not fit each other, or the base model."""


class BaseModelError(PcbPeftError):
    """A base model is missing, needed, or not in a readable form."""


class OptionError(PcbPeftError, ValueError):
    """A value from a caller or a recipe is not allowed."""


class OutputError(PcbPeftError, OSError):
    """An output cannot be written."""


class NoSpaceError(OutputError):
    """An output cannot be written because the disk, or a quota, is full."""


class ProcessError(PcbPeftError):
    """Another process of the merge stopped."""
