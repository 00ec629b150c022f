"""Changes of image models that multiply W: (IA)³, GLoRA and OFT of LyCORIS. All of them need the base model."""

import functools
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Dense
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.formats.base_weights import Base, BaseWeight
from pcb_peft.formats.checkpoint import read_finite
from pcb_peft.formats.lazy_delta import LazyDelta
from pcb_peft.formats.tuner import ModuleTensors

Change: TypeAlias = Callable[[ModuleTensors, Tensor], Tensor]
"""From the tensors of a module, and W as (out, in, kernel) in float64, to ΔW of the same shape."""


def multiplies_weight(module: ModuleTensors) -> bool:
    """Return whether the change of a module is a product with W."""
    return any(part in module.names for part in KINDS)


def scaling_change(module: ModuleTensors, canonical: str, base: Base) -> LazyDelta:
    """Return the change of a module whose tensors multiply W, as the matrix that is added to W.

    Args:
        module: Tensors of the module.
        canonical: Name of the module in the base model.
        base: The base model; without it, a side of the matrix that the tensors do not show is 0 long.

    Raises:
        AdapterError: Tensors are missing, or do not fit each other or W.
        UnsupportedError: The module has another change, too, or is a BOFT.
    """
    kind, parts, change = next(KINDS[part] for part in KINDS if part in module.names)
    if missing := [part for part in parts if part not in module.names]:
        raise AdapterError(
            f"{module.path} has {', '.join(module.names.values())}: {', '.join(missing)} of its {kind} is missing"
        )
    others = module.names.keys() - {*parts, "alpha", "rescale", "bias"}
    if others or (kind == "OFT" and len(module.shape("oft_blocks")) != 3):
        what = ", ".join(sorted(others)) or "a butterfly (BOFT)"
        raise UnsupportedError(
            f"{module.path} has an {kind} with {what}, which is not read: extract the LoRA from a model that it is "
            "merged into (pcb-peft extract)"
        )
    why = f"{kind} multiplies W"
    stored = None if base is None else base().shape(canonical)
    shape = (0, 0) if stored is None else (stored[0], math.prod(stored[1:]))
    inputs = 0 if stored is None else stored[1]
    weight = BaseWeight(base, canonical, shape, why)
    load = functools.partial(_load, module, weight, inputs, change)
    return LazyDelta(Dense, shape, load, missing="" if base else f"{canonical}: {why}")


def _load(module: ModuleTensors, weight: BaseWeight, inputs: int, change: Change) -> Dense:
    before, layout = weight.read()
    grouped = before.double().view(len(before), inputs, -1)  # (out, in, kernel)
    try:
        delta = change(module, grouped)
    except RuntimeError as error:  # torch names the sizes
        raise AdapterError(
            f"{module.path}: {', '.join(module.names.values())} do not fit W, which is {tuple(grouped.shape)}: {error}"
        ) from error
    return Dense(delta.reshape(before.shape).float(), layout=layout)


def _values(module: ModuleTensors, part: str) -> Tensor:
    return read_finite(module.tensors, module.names[part]).double()


def _ia3(module: ModuleTensors, weight: Tensor) -> Tensor:
    """Return ΔW = W ∘ v, with one factor per input or per output.

    Source: Liu et al. 2022, arXiv:2205.05638, section 3.3, with 1 + v for their factors, as LyCORIS has them.
    """
    factors = _values(module, "ia3").flatten()
    if float(_values(module, "on_input")):
        return weight * factors.view(1, weight.shape[1], 1)
    return weight * factors.view(len(weight), 1, 1)


def _glora(module: ModuleTensors, weight: Tensor) -> Tensor:
    """Return ΔW = alpha/r · (W a1 a2 + b1 b2).

    Source: Chavan et al. 2023, arXiv:2306.07967, equation 4, without its other terms, as LyCORIS has it.
    """
    a1, a2, b1, b2 = (_values(module, part).flatten(1) for part in ("a1", "a2", "b1", "b2"))
    scaling = float(_values(module, "alpha")) / len(a2) if "alpha" in module.names else 1.0
    of_weight = torch.einsum("oik,ij->ojk", weight, a1 @ a2)
    return scaling * (of_weight + (b1 @ b2).view_as(weight))


def _oft(module: ModuleTensors, weight: Tensor) -> Tensor:
    """Return ΔW = s ∘ (Rᵀ W) − W, with R of blocks (I + Q)(I − Q)⁻¹ along the outputs, Q = B − Bᵀ.

    Source: Qiu et al. 2023, arXiv:2306.07280, sections 3.3 and 3.4; the norm of Q is at most alpha · out.
    """
    blocks = _values(module, "oft_blocks")
    skew = blocks - blocks.mT
    limit = float(_values(module, "alpha")) * len(weight) if "alpha" in module.names else 0.0
    norm = float(skew.norm())
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    one = torch.eye(blocks.shape[-1], dtype=torch.float64)
    rotation = (one + skew) @ torch.linalg.inv(one - skew)
    rows = weight.reshape(len(blocks), blocks.shape[-1], -1)
    rotated = torch.einsum("knm,knp->kmp", rotation, rows).reshape(weight.shape)
    if "rescale" in module.names:
        rotated = rotated * _values(module, "rescale").view(len(weight), 1, 1)
    return rotated - weight


KINDS: dict[str, tuple[str, tuple[str, ...], Change]] = {
    "ia3": ("(IA)³", ("ia3", "on_input"), _ia3),
    **dict.fromkeys(("a1", "a2", "b1", "b2"), ("GLoRA", ("a1", "a2", "b1", "b2"), _glora)),
    "oft_blocks": ("OFT", ("oft_blocks",), _oft),
}
"""Part of a module's tensors to the kind of change, all of its parts, and its formula."""
