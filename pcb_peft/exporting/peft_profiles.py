"""PEFT's own format: the portable form, which servers read alike, and the smallest exact form for PEFT itself."""

from collections.abc import Sequence

import torch

from pcb_peft.consumers.check import check
from pcb_peft.consumers.vllm import RANKS
from pcb_peft.deltas.delta import LowRank
from pcb_peft.exporting.low_rank import without_spare_ranks
from pcb_peft.exporting.profile import Profile, Request
from pcb_peft.runtime.shown import typed


def _write_portable(request: Request) -> Sequence[str]:
    request.adapter.save_pretrained(
        request.output, dtype=request.dtype or torch.float32, overwrite=request.overwrite
    )
    if request.adapter.task_type not in (
        None,
        "CAUSAL_LM",
    ):  # what servers of language models do not take
        return [_loaded(request)]
    name = typed(request.adapter.base_model or "BASE_MODEL")
    flags = " ".join(check(request.output, "vllm").verdicts[0].flags)
    return [f"vllm serve {name} {flags} --lora-modules merged={typed(request.output)}"]


def _write_smallest(request: Request) -> Sequence[str]:
    adapter = without_spare_ranks(request.adapter)
    ranks = {entry.rank for entry in adapter.modules.entries.values()}
    kinds = {entry.kind for entry in adapter.modules.entries.values()}
    pattern = kinds == {LowRank} and len(ranks) > 1
    adapter.save_pretrained(
        request.output,
        dtype=request.dtype or torch.float32,
        rank_pattern=pattern,
        overwrite=request.overwrite,
    )
    return [_loaded(request)]


def _loaded(request: Request) -> str:
    adapter = request.adapter
    if adapter.heads:
        base, head = adapter.base_model or "BASE_MODEL", next(iter(adapter.heads))
        return f'load_merged("{base}", "{request.output}", head="{head}")'
    return f'PeftModel.from_pretrained(base_model, "{request.output}")'


PORTABLE = Profile(
    "portable",
    "vLLM, SGLang, TensorRT-LLM, LoRAX, OpenVINO, NIM and PEFT: one rank, scaling 1, a minimal configuration",
    frozenset({"output", "experts"}),
    _write_portable,
    max_rank=RANKS[-1],
    wider="peft",
)
PEFT = Profile(
    "peft",
    "PEFT: the smallest exact form, with each module's own rank",
    frozenset({"dora", "ia3", "head", "rows", "bias", "embedding", "output", "experts"}),
    _write_smallest,
    tolerance=1e-4,
)
