"""What a merge may use of a machine: a device, and so much memory."""

import torch

from pcb_peft.errors import OptionError

DEFAULT_MEMORY = 2 << 30  # bytes that a merge may keep between its passes
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def working_device(given: str | torch.device | None) -> torch.device:
    """A device that can be computed on here; the CPU where none is given.

    Raises:
        OptionError: It cannot.
    """
    try:
        device = torch.device("cpu" if given is None else given)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        gpu = f"cuda ({torch.cuda.device_count()})" if torch.cuda.is_available() else "no cuda"
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"device is {given!r}, which does not work here ({reason}); there is cpu, and {gpu}"
        ) from error
    return device


def number_of_bytes(given: int | str) -> int:
    """A number of bytes, as it stands or in words: "1G", "512M", "64K".

    Raises:
        OptionError: It is none, or negative.
    """
    number = str(given).strip().upper().removesuffix("IB").removesuffix("B")
    unit = UNITS.get(number[-1:])
    try:
        count = int(float(number[:-1]) * unit if unit else float(number))
    except (ValueError, OverflowError) as error:
        raise OptionError(
            f"max_memory is {given!r}; it must be a number of bytes, such as 1G or {1 << 30}"
        ) from error
    if count < 0:
        raise OptionError(f"max_memory is {given!r}; it must be 0 or more")
    return count
