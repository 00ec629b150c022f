"""Number formats of weights: what a caller may ask for, and what safetensors calls them."""

import torch

from pcb_peft.errors import OptionError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
SAFETENSORS_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Floating-point formats by the names that they have in the header of a safetensors file."""
WEIGHT_DTYPES = SAFETENSORS_FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Formats in which an adapter may store its weights."""


def parse_dtype(dtype: object) -> torch.dtype:
    """Return the torch dtype of ``"bfloat16"``, ``"torch.bfloat16"`` or ``torch.bfloat16``.

    Raises:
        OptionError: It is not a floating-point format in which weights are stored.
    """
    name = str(dtype).removeprefix("torch.")
    if isinstance(dtype, str | torch.dtype) and name in DTYPES:
        return DTYPES[name]
    raise OptionError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
