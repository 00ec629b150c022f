"""DoRA: W' = m/‖V‖ V for V = W + lora_B @ lora_A, with one norm per output.

Source: Liu et al. 2024, arXiv:2402.09353, equation 5.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pcb_peft.deltas.delta import LowRank, Rescaled
from pcb_peft.errors import UnsupportedError
from pcb_peft.formats.keys import PREFIX
from pcb_peft.formats.lazy_delta import AdapterFiles

ZERO_NORM = 1e-7
"""A row counts as zero if its norm is a smaller part of the largest: float32 rounding."""


def rescaled(
    weight: Tensor, change: LowRank, magnitude: Tensor, read: Callable[[], Tensor]
) -> Rescaled:
    """Return ΔW of a DoRA: diag(m/‖V‖ − 1) W + diag(m/‖V‖) BA.

    Args:
        weight: W (out, in).
        change: BA, which is added to W before its rows are rescaled.
        magnitude: m, any shape of `out` values.
        read: Reads W again, later.
    """
    direction = weight.double() + change.matrix().double()
    factor = magnitude.double().flatten() / torch.linalg.vector_norm(direction, dim=1)
    lora_B = (change.lora_B.double() * factor[:, None]).float()
    added = dataclasses.replace(change, lora_B=lora_B)
    return Rescaled(factor - 1, added, read, layout=change.layout)


def direction(delta: Rescaled) -> LowRank:
    """Return the LoRA that is added to W before its rows are rescaled: diag(1 / (1 + gain)) times the added part."""
    lora_B, lora_A = delta.added.factors()
    return LowRank(
        lora_A.float(), (lora_B * delta.inverse_scale()[:, None]).float(), layout=delta.layout
    )


def with_magnitudes(written: AdapterFiles, deltas: Mapping[str, Rescaled]) -> AdapterFiles:
    """Return the file contents of a LoRA as those of a DoRA.

    m is (1 + gain) ‖V‖ for the V of the rounded tensors. m itself stays float32: rounded, it would change W itself.

    Args:
        written: The `direction` of each delta, as a LoRA of scaling 1.
        deltas: Deltas by module, none of which multiplies a row of W by 0 (`Rescaled.without_zero_rows`).

    Raises:
        UnsupportedError: A row of V is zero, by whose norm PEFT would divide.
    """
    if not deltas:
        return written
    tensors = dict(written.tensors)
    for module, delta in deltas.items():
        kind = "embedding_{}" if delta.layout.lookup else "{}.weight"
        lora_A, lora_B = (
            tensors[f"{PREFIX}{module}.lora_{kind.format(side)}"].flatten(1) for side in "AB"
        )
        magnitude = magnitudes(module, delta, LowRank(lora_A, lora_B))
        kernel = len(delta.layout.shape or ()) - 2
        shape = (1, -1, *[1] * kernel) if delta.layout.shape else (-1,)
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude.view(shape)
    return dataclasses.replace(written, config=written.config | {"use_dora": True}, tensors=tensors)


def magnitudes(module: str, delta: Rescaled, lora: LowRank) -> Tensor:
    """Return m (out,) of a DoRA: (1 + gain) ‖W + ΔW‖ of each row, for the `direction` as it is written.

    Raises:
        UnsupportedError: A row of W + ΔW is zero, by whose norm programs would divide.
    """
    changed = delta.weight().double() + lora.lora_B.double() @ lora.lora_A.double()
    norms = torch.linalg.vector_norm(changed, dim=1)
    empty = norms <= ZERO_NORM * norms.max()
    if empty.any():
        raise UnsupportedError(
            f"{module}: row {int(empty.nonzero()[0])} of W with its change is zero, and a DoRA divides by its norm: "
            "merge in space='dense' (--space dense), which leaves as a LoRA, or fold"
        )
    return ((1 + delta.gain) * norms).float()
