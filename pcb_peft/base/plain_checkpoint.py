"""A quantised checkpoint, described as the checkpoint that it would be without quantisation."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import safe_open
from torch import Tensor

from pcb_peft.base.files import TensorInfo
from pcb_peft.base.quantised import (
    QuantisedWeight,
    of_no_use_without,
    quantised_weights,
    without_quantisation,
)

DTYPE, BYTES = "BF16", 2
QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which GPTQ, AWQ and ModelOpt describe a quantisation a second time, beside ``config.json``."""

Plain: TypeAlias = tuple[dict[str, Any], dict[str, TensorInfo], dict[str, QuantisedWeight]]


def plain_checkpoint(
    config: Mapping[str, Any], stored: Mapping[str, TensorInfo], directory: Path, source: str
) -> Plain:
    """Describe a quantised checkpoint without its quantisation.

    Args:
        config: ``config.json``.
        stored: Tensor in the files to its place.
        directory: Directory of the files.
        source: The checkpoint's name, for messages.

    Returns:
        The configuration without quantisation; the tensors, in which a quantised weight has its own name and shape, in
        bfloat16; and how each of those weights is computed.

    Raises:
        BaseModelError: A weight is stored in a way that is not known.
    """

    def read(name: str) -> Tensor:
        return values_in(directory / stored[name].file, name)

    quantised = quantised_weights(config, stored, read, source)
    dropped = of_no_use_without(quantised, stored)
    tensors = {name: info for name, info in stored.items() if name not in dropped}
    for name, weight in quantised.items():
        codes = stored[weight.parts[0]]
        end = codes.begin + BYTES * math.prod(weight.shape)
        tensors[name] = TensorInfo(codes.file, codes.begin, end, weight.shape, DTYPE)
    return without_quantisation(config, "bfloat16"), tensors, quantised


def values_in(path: Path, name: str) -> Tensor:
    """Read a tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
