"""Lines at the end of a command: where its output is, and what to do with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pcb_peft.runtime.units import format_size

if TYPE_CHECKING:
    from pcb_peft.merging.report import Report
    from pcb_peft.merging.result import MergedAdapter

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes


def size_on_disk(directory: Path) -> int:
    """Size of a directory's files, in bytes."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def highest_rank(report: Report) -> int | None:
    """The highest rank of a module; None where no module has one."""
    ranks = [module.rank for module in report.modules.values() if module.rank is not None]
    return max(ranks, default=None)


def where_written(output: Path, rank: int | None, size: int) -> str:
    """Say where an adapter was written, its rank and its size."""
    facts = [*([] if rank is None else [f"rank {rank}"]), format_size(size)]
    return f"written to {output}: {', '.join(facts)}"


def after_merge(merged: MergedAdapter, output: Path, rank: int | None) -> str:
    """Say how to load, serve and fold a merged adapter that was saved."""
    base = merged.base_model or "BASE_MODEL"
    lines = [f'  load   PeftModel.from_pretrained(base_model, "{output}")']
    served = next((most for most in VLLM_RANKS if rank is not None and rank <= most), None)
    if served is not None and merged.task_type == "CAUSAL_LM":
        lines.append(
            f"  serve  vllm serve {base} --enable-lora --max-lora-rank {served} --lora-modules merged={output}"
        )
    lines.append(f"  fold   pcb-peft fold {output} {base} -o {output}-model")
    return "\n".join(["next:", *lines])


def after_fold(output: Path) -> str:
    """Say how to load a folded model."""
    return f'next:\n  load   AutoModel.from_pretrained("{output}"), or the class of your task'


def missing_heads(merged: MergedAdapter, output: Path) -> str | None:
    """Say that a merged adapter lacks what its sources replace in different ways; None where it lacks nothing."""
    if not merged.heads:
        return None
    modules = sorted({module for kept in merged.heads.values() for module in kept.modules})
    owners = ", ".join(merged.heads)
    return (
        f"the merged adapter has NO {' and '.join(modules) or 'head'} of its own: {owners} have different ones, "
        f"saved in {output / 'heads'}. Load one of them first, or PEFT will make one up"
    )
