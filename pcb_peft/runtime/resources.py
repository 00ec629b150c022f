"""Device and memory that a merge may use."""

import torch

from pcb_peft.errors import OptionError

DEFAULT_MEMORY = 2 << 30  # bytes that a merge may keep between its passes
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def working_device(given: str | torch.device | None) -> torch.device:
    """Return the device to compute on, after trying it; the CPU if none is given.

    Raises:
        OptionError: It does not work here.
    """
    try:
        device = torch.device("cpu" if given is None else given)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"device is {given!r}, which does not work here ({reason}); devices that do: {', '.join(['cpu', *gpus])}"
        ) from error
    return device


def number_of_bytes(given: int | str) -> int:
    """Return a number of bytes that is given as such, or as a text: "1G", "512M", "64K".

    Raises:
        OptionError: It is not a number of bytes, or it is negative.
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
