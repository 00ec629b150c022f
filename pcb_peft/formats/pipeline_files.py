"""Files of image LoRAs that other programs load: diffusers, kohya's tools and web UIs, ComfyUI."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from pcb_peft.deltas.delta import LowRank
from pcb_peft.errors import UnsupportedError
from pcb_peft.formats.checkpoint import PIPELINE
from pcb_peft.formats.fused import exchanged_lora, regrouped
from pcb_peft.formats.lazy_delta import AdapterFiles, is_vector
from pcb_peft.formats.registry import Writer, register
from pcb_peft.images.metadata import metadata_of
from pcb_peft.images.names import COMFYUI, DIFFUSERS, KOHYA, ImageLora
from pcb_peft.images.targets import (
    BIAS,
    WEIGHT,
    exchanged_in_file,
    factor_names,
    names_in_file,
    with_components,
)


def _write(
    target: str,
    modules: Mapping[str, LowRank],
    dtype: torch.dtype,
    *,
    image: ImageLora | None = None,
    rank_pattern: bool = False,
) -> AdapterFiles:
    """Return the deltas in the names of a program.

    diffusers' files have one rank for all modules unless `rank_pattern`; in the others each module has its own. The
    scaling is 1, and in kohya's files all modules have one alpha, the highest rank: diffusers reads no other right.
    Changes of norms and biases are stored whole.

    Raises:
        UnsupportedError: A module has no name that the program knows.
    """
    shapes = {name: delta.shape for name, delta in modules.items()}
    names = names_in_file(shapes, image, target)
    deltas = regrouped(with_components(modules, image, target), list(names))
    whole = {module for module, name in names.items() if name.endswith((WEIGHT, BIAS))}
    highest = max((one.rank for name, one in deltas.items() if name not in whole), default=1)
    first, second = factor_names(shapes, image, target)
    tensors: dict[str, Tensor] = {}
    for module, name in names.items():
        delta = deltas[module]
        if exchanged_in_file(name, module, shapes):
            delta = exchanged_lora(delta)
        if module in whole:
            tensors[name] = delta.layout.stored(delta.matrix()).to(dtype)
            continue
        padded = highest if target == DIFFUSERS and not rank_pattern else delta.rank
        scaling = delta.rank / highest if target == KOHYA else 1.0
        down, up = _factors(module, delta.scaled(scaling), dtype, padded)
        tensors |= {f"{name}.{first}.weight": down, f"{name}.{second}.weight": up}
        if target == KOHYA:
            tensors[f"{name}.alpha"] = torch.tensor(float(highest))
    return AdapterFiles({}, tensors, PIPELINE, metadata_of(image, target, highest))


def _factors(module: str, delta: LowRank, dtype: torch.dtype, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors at scaling 1, padded with zeros to a rank, as the layer stores them."""
    if is_vector(delta) or delta.layout.transposed:
        raise UnsupportedError(
            f"{module}: files of image models hold LoRAs of matrices and convolutions only"
        )
    kernel = () if delta.layout.shape is None else delta.layout.shape[2:]
    lora_A, lora_B = delta.padded(rank)
    down, up = lora_A.reshape(rank, -1, *kernel), lora_B[(..., *[None] * len(kernel))]
    return down.to(dtype), up.to(dtype)


for program in (DIFFUSERS, KOHYA, COMFYUI):
    register(
        Writer(
            program,
            functools.partial(_write, program),
            functools.partial(names_in_file, target=program),
            defined_by=_write,
        )
    )
