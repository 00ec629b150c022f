"""The difference of two checkpoints, as an adapter."""

import dataclasses
import functools
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.beside import labels_in
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.adapters.source import Source
from pcb_peft.base.canonical import task_type_of_class
from pcb_peft.base.model import BaseModel, opened_base
from pcb_peft.deltas.delta import Dense, LowRank
from pcb_peft.deltas.layout import Layout
from pcb_peft.deltas.rank import truncate
from pcb_peft.deltas.rank_choice import EnergyFraction, FixedRank, Full, Lossless, parse_rank
from pcb_peft.deltas.replacements import ReplacedParameter, Replacements, Task
from pcb_peft.errors import OptionError, UnsupportedError
from pcb_peft.extraction.comparison import Comparison, compare_checkpoints, stack_of
from pcb_peft.formats import LazyDelta, in_memory, vector_delta
from pcb_peft.merging.report import ModuleReport, Report, ReportBuilder
from pcb_peft.runtime.progress import tracker
from pcb_peft.writing.targets import existing

LORA_PARAMETERS = (".weight", ".in_proj_weight")  # ends of matrices that a LoRA can change


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ExtractedAdapter(Adapter):
    """An adapter that is the difference of two checkpoints.

    Attributes:
        report: What the adapter holds and leaves out, and how much of the difference it retains.
        biases: Functions that read the fine-tuned model's biases beside the matrices of a LoRA. A LoRA has room for
            changes of biases in all modules or in none, but can store whole biases of any module (PEFT's
            ``bias="lora_only"``).
    """

    report: Report
    biases: Mapping[str, Callable[[], Tensor]] = dataclasses.field(
        default_factory=dict[str, Callable[[], Tensor]]
    )

    def whole_biases(self) -> Mapping[str, Callable[[], Tensor]]:
        return self.biases

    def noted(self, notes: Sequence[str]) -> "ExtractedAdapter":
        report = dataclasses.replace(self.report, notes=(*self.report.notes, *notes))
        return dataclasses.replace(self, report=report)


def extract_adapter(
    finetuned: str | Path | BaseModel,
    base_model: str | Path | BaseModel,
    rank: int | float | str | None = None,
    *,
    leave_out: Sequence[str] = (),
    progress: bool | None = None,
    dequantize: bool = False,
) -> ExtractedAdapter:
    """Return the adapter that turns a base model into a fine-tuned one.

    Both checkpoints are compared tensor by tensor; a difference is computed again each time it is asked for. The
    result can be merged like any adapter, folded, or, with a rank, saved as a LoRA.

    Args:
        finetuned: Path or hub id of a transformers checkpoint in safetensors.
        base_model: Path or hub id of the checkpoint that it was trained from.
        rank: None or "full": every change in full. An integer, or a fraction in (0, 1) of each module's energy to keep:
            a LoRA of the matrices and of the biases beside them; other modules that changed, such as norms, are stored
            whole (PEFT's modules_to_save).
        leave_out: Globs of parameters whose changes are not wanted, such as ``*.bias`` or ``*norm*``.
        progress: Show a bar; default: on a terminal.
        dequantize: Take quantised checkpoints; their weights are computed from their codes.

    Returns:
        The adapter. Its `report` says how much of each module's change it retains.

    Raises:
        MismatchError: A parameter has another shape in one of them, or belongs to one only in a way that no adapter
            expresses.
        UnsupportedError: A LoRA cannot hold a change; the message names it.
        AdapterError: Nothing has changed.

    Example:
        >>> from pcb_peft import extract_adapter
        >>> extracted = extract_adapter("math-model", "base-model", rank=16)
        >>> saved = extracted.save_pretrained("extracted-lora")
    """
    choice = parse_rank(rank)
    if not isinstance(choice, Lossless | Full | FixedRank | EnergyFraction):
        raise OptionError(f"rank is {rank!r}; extraction takes an integer, a fraction, or 'full'")
    started = time.perf_counter()
    tuned = opened_base(finetuned, dequantize=dequantize)
    base = opened_base(base_model, dequantize=dequantize)
    comparison = compare_checkpoints(tuned, base, tuple(leave_out), tracker(progress))
    report = ReportBuilder(comparison.notes)
    entries = {
        name.removesuffix(".weight"): _entry(comparison, name) for name in comparison.changed
    }
    saved = {name.rpartition(".")[0] for name in comparison.added}
    biases: dict[str, Callable[[], Tensor]] = {}
    if isinstance(choice, FixedRank | EnergyFraction):
        lora = _as_lora(entries, choice, base, report)
        vectors = [name for name in comparison.changed if len(comparison.shape(name)) == 1]
        bias_names, owners = _beside_lora(vectors, lora)
        biases = {name: comparison.reader(name) for name in bias_names}
        entries = lora | {name: entries[name] for name in biases}
        saved |= owners
    task = _task(tuned.config)
    return ExtractedAdapter(
        name=Source(tuned.source).name,
        modules=DeltaMapping(entries),
        base_model=base.source,
        task_type=task.task_type,
        head=_head(comparison, saved, task),
        report=report.build("extract", "dense", "module", time.perf_counter() - started),
        biases=biases,
        inputs=existing(tuned.directory, base.directory),
    )


def _entry(comparison: Comparison, name: str) -> LazyDelta:
    """Return the change of one parameter."""
    change, shape = comparison.change_reader(name), comparison.shape(name)
    if len(shape) == 1:
        return LazyDelta(LowRank, (shape[0], 1), functools.partial(_vector, change), 1)
    layout = comparison.base.layout(name.removesuffix(".weight"), (1, 1))
    if stack_of(name):
        layout = dataclasses.replace(layout, expert=int(name.rpartition(".")[2]))
    load = functools.partial(_matrix, change, layout)
    is_expert = layout.expert is not None
    return LazyDelta(Dense, layout.matrix_shape(shape), load, stacked=is_expert)


def _vector(change: Callable[[], Tensor]) -> LowRank:
    return vector_delta(change())


def _matrix(change: Callable[[], Tensor], layout: Layout) -> Dense:
    return Dense(layout.matrix(change()).contiguous(), layout=layout)


def _task(config: Mapping[str, Any]) -> Task:
    """Return the task that a model was fine-tuned for, as its configuration states it."""
    stated = (config.get("architectures") or [""])[0]
    return Task(task_type_of_class(stated), labels_in(config))


def _head(comparison: Comparison, modules: set[str], task: Task) -> Replacements:
    """Return modules that are stored whole, with all their parameters."""
    names = [name for name in comparison.tuned.names.in_model if name.rpartition(".")[0] in modules]
    return Replacements(
        tuple(sorted(modules)),
        {
            name: ReplacedParameter(comparison.shape(name), comparison.reader(name))
            for name in names
        },
        task=task,
    )


def _as_lora(
    entries: Mapping[str, LazyDelta],
    rank: FixedRank | EnergyFraction,
    base: BaseModel,
    report: ReportBuilder,
) -> dict[str, LazyDelta]:
    """Return the changes of matrices at this rank."""
    lora: dict[str, LazyDelta] = {}
    for module, entry in entries.items():
        if entry.kind is not Dense:
            continue
        if not entry.stacked:
            _refuse_what_no_lora_holds(module, base)
        delta, energy = truncate(entry.load(), rank)
        lora[module] = dataclasses.replace(in_memory(delta), stacked=entry.stacked)
        report.modules[module] = ModuleReport(
            entry.shape, delta.rank, energy, delta.norm(), kept={}, conflicts=0.0
        )
    return lora


def _beside_lora(vectors: Sequence[str], lora: Container[str]) -> tuple[list[str], set[str]]:
    """Return the biases beside the matrices of a LoRA, and the modules of all other vectors.

    Args:
        vectors: Vectors that have changed.
        lora: Modules of the LoRA.

    Raises:
        UnsupportedError: PEFT has no place for a vector.
    """
    biases: list[str] = []
    owners: set[str] = set()
    for name in vectors:
        owner, _, kind = name.rpartition(".")
        attentions = (owner, owner.rpartition(".")[0])
        if any(f"{attention}.in_proj_weight" in lora for attention in attentions):
            raise UnsupportedError(
                f"{name} has changed, and PEFT has no place for it beside a LoRA of the same attention; leave it out: "
                f"leave_out=[{name!r}]"
            )
        if kind == "bias" and owner in lora:
            biases.append(name)
        else:
            owners.add(owner)
    return biases, owners


def _refuse_what_no_lora_holds(module: str, base: BaseModel) -> None:
    parameter = base.name_in_memory(module)
    if not parameter.endswith(LORA_PARAMETERS):
        raise UnsupportedError(
            f"{module} has changed, and is a parameter of several dimensions that no layer holds as its weight: "
            "extract it without a rank and fold it, or leave it out"
        )
    if tied := base.names.tied(parameter):
        raise UnsupportedError(
            f"{module} has changed, and is tied to {', '.join(tied)}: PEFT applies a LoRA to one end of it only; save "
            "both models with tie_word_embeddings=false, or leave it out"
        )
