"""LoRAs whose initialisation takes something out of W: PiSSA, OLoRA, KaSA."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pcb_peft.deltas.delta import LowRank
from pcb_peft.deltas.linalg import svd
from pcb_peft.errors import UnsupportedError
from pcb_peft.formats.registry import Config


@dataclasses.dataclass(frozen=True, slots=True)
class InitResidual:
    """What PEFT takes out of W when it makes or loads an adapter.

    Attributes:
        reason: Why ΔW depends on W.
        function: From W (out, in), the rank r and the scaling to (out, r) and (r, in), whose product is taken.
    """

    reason: str
    function: Callable[[Tensor, int, float], tuple[Tensor, Tensor]]


CONVERSION = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
IRREPRODUCIBLE = ("pissa_niter", "corda", "lora_ga", "loftq")
PLAIN = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # W stays as it is


def _pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Its r largest singular triplets."""
    del scaling
    u, s, vh = svd(weight)
    return u[:, :rank] * s[:rank], vh[:rank]


def _olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """`scaling` times the r first columns and rows of its QR decomposition."""
    q, r = torch.linalg.qr(weight)
    return q[:, :rank] * scaling, r[:rank]


def _kasa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Its r smallest singular triplets."""
    del scaling
    u, s, vh = svd(weight)
    return u[:, -rank:] * s[-rank:], vh[-rank:]


def taken_from(config: Config) -> InitResidual | None:
    """What PEFT takes out of W with this configuration; None for a plain initialisation.

    Raises:
        UnsupportedError: It cannot be computed again from W, or is not known.
    """
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(IRREPRODUCIBLE):
        raise UnsupportedError(
            f"init_lora_weights = {init!r} is not supported: it changes the base weights in a way that W alone does "
            f"not tell, so the change of the original model is not known; convert the adapter with PEFT's {CONVERSION}"
        )
    if config.get("kasa_config"):
        return InitResidual("KaSA takes the smallest singular triplets out of W", _kasa)
    if init.startswith("pissa"):
        return InitResidual("PiSSA takes the largest singular triplets out of W", _pissa)
    if init.startswith("olora"):
        return InitResidual("OLoRA takes a part of the QR decomposition out of W", _olora)
    if init not in PLAIN:
        raise UnsupportedError(
            f"init_lora_weights = {init!r} is not known, and may take something out of W; convert the adapter with "
            f"PEFT's {CONVERSION}, or, if it leaves W as it is, write true into its configuration"
        )
    return None


def without(delta: LowRank, taken: tuple[Tensor, Tensor]) -> LowRank:
    """ΔW less what was taken out of W: rank 2r."""
    left, right = taken
    lora_B = torch.cat([delta.lora_B.double() * delta.scaling, -left.double()], dim=1)
    lora_A = torch.cat([delta.lora_A, right.to(delta.lora_A.dtype)])
    return LowRank(lora_A, lora_B.float(), layout=delta.layout)
