"""A quantised checkpoint, described as the checkpoint that it would be without quantisation."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import safe_open
from torch import Tensor

from pcb_peft.base.architecture import build_skeleton
from pcb_peft.base.files import TensorInfo
from pcb_peft.base.quantised import (
    QuantisedWeight,
    of_no_use_without,
    quantised_weights,
    without_quantisation,
)
from pcb_peft.deltas.dtypes import SAFETENSORS_FLOATS
from pcb_peft.deltas.layout import CONV1D, layout_of
from pcb_peft.deltas.linalg import all_finite
from pcb_peft.errors import BaseModelError

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

    found = quantised_weights(config, stored, read, source)
    quantised = _as_layers_have_them(found, directory)
    dropped = of_no_use_without(quantised, stored)
    tensors = {name: info for name, info in stored.items() if name not in dropped}
    for name, weight in quantised.items():
        codes = stored[weight.parts[0]]
        end = codes.begin + BYTES * math.prod(weight.shape)
        tensors[name] = TensorInfo(codes.file, codes.begin, end, weight.shape, DTYPE)
    return without_quantisation(config, "bfloat16"), tensors, quantised


def _as_layers_have_them(
    found: Mapping[str, QuantisedWeight], directory: Path
) -> dict[str, QuantisedWeight]:
    """Transpose the weights of Conv1D layers, in whose place a quantised model has linear layers."""
    skeleton = build_skeleton(directory)

    def is_transposed(name: str) -> bool:
        layer = skeleton.layer(skeleton.in_memory(name).removesuffix(".weight"))
        return layer is not None and layout_of(layer) == CONV1D

    return {
        name: _transposed(weight) if is_transposed(name) else weight
        for name, weight in found.items()
    }


def _transposed(weight: QuantisedWeight) -> QuantisedWeight:
    values: Callable[[], Tensor] = weight.values
    return dataclasses.replace(
        weight, shape=weight.shape[::-1], values=lambda: values().T.contiguous()
    )


def values_in(path: Path, name: str) -> Tensor:
    """Read a tensor of a safetensors file.

    Raises:
        BaseModelError: It holds NaN or infinite values.
    """
    with safe_open(path, framework="pt") as file:
        values = file.get_tensor(name)
    if values.dtype in SAFETENSORS_FLOATS.values() and not all_finite(values):
        raise BaseModelError(f"{path}: {name} holds NaN or infinite values; fetch the model again")
    return values
