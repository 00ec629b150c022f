"""LoRAs whose initialisation takes something out of W: PiSSA, OLoRA, KaSA."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pcb_peft.deltas.delta import LowRank
from pcb_peft.deltas.linalg import svd
from pcb_peft.errors import UnsupportedError
from pcb_peft.formats.lazy_delta import Config
from pcb_peft.runtime.shown import quoted


@dataclasses.dataclass(frozen=True, slots=True)
class InitResidual:
    """The part of W that PEFT takes out when it makes or loads an adapter.

    Attributes:
        reason: Why ΔW depends on W.
        function: From W (out, in), the rank r and the scaling to (out, r) and (r, in), whose product is taken out.
    """

    reason: str
    function: Callable[[Tensor, int, float], tuple[Tensor, Tensor]]


CONVERSION = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
IRREPRODUCIBLE = ("pissa_niter", "corda", "lora_ga", "loftq")
PLAIN = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # W stays as it is


def _pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the r largest singular triplets of W."""
    del scaling
    u, s, vh = svd(weight)
    return u[:, :rank] * s[:rank], vh[:rank]


def _olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return `scaling` times the r first columns and rows of the QR decomposition of W."""
    q, r = torch.linalg.qr(weight)
    return q[:, :rank] * scaling, r[:rank]


def _kasa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the r smallest singular triplets of W."""
    del scaling
    u, s, vh = svd(weight)
    return u[:, -rank:] * s[-rank:], vh[-rank:]


def init_residual(config: Config) -> InitResidual | None:
    """Return the part of W that PEFT takes out with this configuration; None for a plain initialisation.

    Raises:
        UnsupportedError: The initialisation is unknown, or its part cannot be computed again from W.
    """
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(IRREPRODUCIBLE):
        raise UnsupportedError(
            f"init_lora_weights = {quoted(init)} is not supported: it changes the base weights in a way that cannot be "
            "computed again from W, so the change of the original model is not known; convert the adapter with PEFT's "
            f"{CONVERSION}"
        )
    if config.get("kasa_config"):
        return InitResidual("KaSA takes the smallest singular triplets out of W", _kasa)
    if init.startswith("pissa"):
        return InitResidual("PiSSA takes the largest singular triplets out of W", _pissa)
    if init.startswith("olora"):
        return InitResidual("OLoRA takes a part of the QR decomposition out of W", _olora)
    if init not in PLAIN:
        raise UnsupportedError(
            f"init_lora_weights = {quoted(init)} is not known, and may take something out of W; convert the adapter "
            f"with PEFT's {CONVERSION}, or, if it leaves W as it is, write true into its configuration"
        )
    return None


def without_residual(delta: LowRank, taken: tuple[Tensor, Tensor]) -> LowRank:
    """Return ΔW less the part that was taken out of W: rank 2r.

    Args:
        delta: The adapter's change of the W without that part.
        taken: (out, r) and (r, in), whose product was taken out.
    """
    taken_B, taken_A = taken
    lora_B = torch.cat([delta.lora_B.double() * delta.scaling, -taken_B.double()], dim=1)
    lora_A = torch.cat([delta.lora_A, taken_A.to(delta.lora_A.dtype)])
    return LowRank(lora_A, lora_B.float(), layout=delta.layout)
