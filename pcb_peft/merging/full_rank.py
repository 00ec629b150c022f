"""A warning before a merge whose LoRA would have full rank: one (IA)³ among LoRAs is enough for that."""

import warnings

from pcb_peft.consumers.check import USUAL_RANK
from pcb_peft.deltas.delta import LowRank
from pcb_peft.deltas.rank_choice import LOSSLESS
from pcb_peft.merging.prepare import Prepared
from pcb_peft.merging.report import ReportBuilder
from pcb_peft.runtime.units import format_size

FLOAT = 4  # bytes


def warn_of_full_rank(prepared: Prepared, report: ReportBuilder) -> None:
    """Warn of an adapter of full rank, and note it in the report."""
    if warning := full_rank_warning(prepared):
        report.note(warning)
        warnings.warn(warning, stacklevel=4)


def full_rank_warning(prepared: Prepared) -> str:
    """Return a warning with the rank and the size of the adapter that a merge makes; empty where it has a low rank.

    Only a merge without a rank is warned of: whoever gives one knows it.
    """
    adapter_set = prepared.adapter_set
    dense = {
        adapter.name: entry.kind.kind_name
        for adapter in adapter_set.adapters
        for entry in adapter.modules.entries.values()
        if entry.kind is not LowRank and not entry.kind.multiplies and not entry.kind.rescales
    }
    if prepared.recipe.rank != LOSSLESS or not dense:
        return ""
    rank, values = adapter_set.lossless_size()
    if rank <= USUAL_RANK:
        return ""
    size = format_size(FLOAT * values)
    causes = f"{', '.join(dense)} {'change' if len(dense) > 1 else 'changes'}"
    return (
        f"the merged adapter has rank {rank} and takes {size}, because {causes} whole matrices, as an (IA)³ "
        f"among LoRAs does: rank=0.95 (--rank 0.95) keeps 95 % of the energy, rank={USUAL_RANK} is what servers take, "
        "and rank='full' with a fold (--rank full --fold) keeps everything"
    )
