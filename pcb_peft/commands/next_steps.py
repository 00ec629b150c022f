"""Lines at the end of a command: where its output is, and what to do with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pcb_peft.consumers.vllm import served_rank
from pcb_peft.errors import BaseModelError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.runtime.shown import some_modules, typed
from pcb_peft.runtime.units import format_size

if TYPE_CHECKING:
    from pcb_peft.adapters.adapter import Adapter
    from pcb_peft.consumers.check import Check
    from pcb_peft.merging.result import MergedAdapter


def where_written(output: Path, rank: int | None, size: int) -> str:
    """Say where an adapter was written, its rank and its size."""
    facts = [*([] if rank is None else [f"rank {rank}"]), format_size(size)]
    return f"written to {output}: {', '.join(facts)}"


def after_merge(merged: MergedAdapter, output: Path, checked: Check) -> str:
    """Say how to load, serve, test and fold a merged adapter that was saved.

    Args:
        merged: The adapter.
        output: Where it was written.
        checked: Who reads it.
    """
    if merged.file_format != "peft":
        return (
            f'next:\n  load   pipeline.load_lora_weights("{output}") in diffusers, or your web UI'
        )
    base, where = typed(merged.base_model or "BASE_MODEL"), typed(output)
    lines = [f"  load   {_loading(merged, output)}"]
    served = None if merged.report.rank is None else served_rank(merged.report.rank)
    if served is not None and merged.task_type == "CAUSAL_LM" and checked.right_for("vllm"):
        lines.append(
            f"  serve  vllm serve {base} --enable-lora --max-lora-rank {served} --lora-modules merged={where}"
        )
    files = " ".join(
        typed(f"{name}.jsonl") for name in merged.report.adapters
    )  # texts with answers
    lines.append(f"  test   pcb-peft evaluate {where} --data {files}")
    lines.append(f"  fold   pcb-peft fold {where} {base} -o {typed(f'{output}-model')}")
    return "\n".join(["next:", *lines])


def load_with_head(adapter: Adapter, output: Path) -> str:
    """Say how to load a merged adapter that has got a head."""
    return f"next:\n  load   {_loading(adapter, output)}"


def _loading(adapter: Adapter, output: Path) -> str:
    """Return the call that loads a saved adapter."""
    base = adapter.base_model or "BASE_MODEL"
    if adapter.heads:
        return f'load_merged("{base}", "{output}", head="{next(iter(adapter.heads))}")'
    if adapter.head.task.labels:
        return f'load_merged("{base}", "{output}"), or PeftModel.from_pretrained(base_model, "{output}")'
    return f'PeftModel.from_pretrained(base_model, "{output}")'


def after_fold(output: Path) -> str:
    """Say how to load a folded model."""
    if output.suffix == ".safetensors":
        return f"next:\n  load   {output} where the checkpoint is loaded that it was made from"
    if (output / "model_index.json").is_file():
        return f'next:\n  load   DiffusionPipeline.from_pretrained("{output}")'
    config_file = output / "config.json"
    content = read_json_file(config_file, BaseModelError, "") if config_file.is_file() else {}
    if kind := content.get("_class_name"):  # of diffusers
        return f'next:\n  load   {kind}.from_pretrained("{output}")'
    return f'next:\n  load   AutoModel.from_pretrained("{output}"), or the class of your task'


def missing_heads(adapter: Adapter, output: Path, *, folded: bool = False) -> str | None:
    """Say that an output lacks what its sources replace in different ways; None where it lacks nothing.

    Args:
        adapter: What was written.
        output: Where.
        folded: True for a whole model.
    """
    if not adapter.heads:
        return None
    names = {module for kept in adapter.heads.values() for module in kept.modules}
    owners, first = ", ".join(adapter.heads), next(iter(adapter.heads))
    found = (
        f"NO {some_modules(names) or 'head'} of its own: {owners} have different ones, saved in "
        f"{output / 'heads'}"
    )
    if folded:
        return (
            f"the folded model has {found}. What it holds there is the base model's, or nothing: merge with --head "
            f"{first} to fold one in"
        )
    return (
        f"the merged adapter has {found}. Load one first, or PEFT will make one up: pcb-peft head {typed(output)} "
        f"{typed(first)} -o {typed(f'{output}-{first}')}"
    )
