"""A total rank, divided among the modules so that all of them together lose the least energy."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, LowRank
from pcb_peft.deltas.rank import truncate
from pcb_peft.deltas.rank_choice import LOSSLESS
from pcb_peft.errors import OptionError


def within_budget(deltas: Mapping[str, Delta], total: int) -> dict[str, tuple[LowRank, float]]:
    """Return each delta truncated to its share of the budget, and the energy that it retains.

    Every module keeps its leading direction; the rest of the budget goes to the largest singular values of all modules
    together, which is the least loss of Σ‖ΔW‖²_F that the budget allows.

    Raises:
        OptionError: There are more modules than ranks.
    """
    if total < len(deltas):
        raise OptionError(
            f"rank is a budget of {total}, but there are {len(deltas)} modules: give at least one each"
        )
    balanced = {module: truncate(delta, LOSSLESS) for module, delta in deltas.items()}
    spectra = {module: _spectrum(delta) for module, (delta, _) in balanced.items()}
    ranks = ranks_within(spectra, total)
    return {
        module: _truncated(delta, spectra[module], ranks[module], energy)
        for module, (delta, energy) in balanced.items()
    }


def ranks_within(spectra: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """Return the number of each module's singular values (in descending order) that the budget keeps."""
    ranks = dict.fromkeys(spectra, 1)
    others = [(-float(s), module) for module, values in spectra.items() for s in values[1:]]
    for _, module in sorted(others)[: total - len(ranks)]:
        ranks[module] += 1
    return ranks


def _spectrum(delta: LowRank) -> Tensor:
    """Return the singular values of a delta with balanced factors."""
    return delta.lora_B.double().norm(dim=0) * delta.lora_A.double().norm(dim=1)


def _truncated(delta: LowRank, spectrum: Tensor, rank: int, energy: float) -> tuple[LowRank, float]:
    total, kept = spectrum.square().sum(), spectrum[:rank].square().sum()
    retained = energy * float(torch.where(total > 0, kept / total, 1.0))
    lora_A, lora_B = delta.lora_A[:rank].contiguous(), delta.lora_B[:, :rank].contiguous()
    return LowRank(lora_A, lora_B, layout=delta.layout), retained
