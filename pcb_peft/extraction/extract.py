"""What fine-tuning did to a base model, as an adapter: the difference of two checkpoints."""

import dataclasses
import fnmatch
import functools
import time
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.adapters.source import Source
from pcb_peft.base.model import BaseModel, open_base_model
from pcb_peft.deltas.delta import Dense, LowRank
from pcb_peft.deltas.rank import truncate
from pcb_peft.deltas.rank_choice import EnergyFraction, FixedRank, Lossless, parse_rank
from pcb_peft.deltas.replacements import Parameter, Replacements
from pcb_peft.errors import AdapterError, MismatchError, OptionError, UnsupportedError
from pcb_peft.formats import LazyDelta
from pcb_peft.formats.lazy_delta import vector_delta
from pcb_peft.merging.report import ModuleReport, Report, ReportBuilder
from pcb_peft.runtime.progress import Track, tracker

MATRICES = (".weight", ".in_proj_weight")  # parameters that a LoRA can change, if they are matrices


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ExtractedAdapter(Adapter):
    """An adapter that is the difference of two checkpoints.

    Attributes:
        report: What it holds, what it left out, and how much of the difference it retains.
        biases: The fine-tuned model's biases beside the matrices of a LoRA. A LoRA has room for changes of biases in
            all modules or in none, but stores whole ones (PEFT's ``bias="lora_only"``) where it likes.
    """

    report: Report
    biases: Mapping[str, Callable[[], Tensor]] = dataclasses.field(
        default_factory=dict[str, Callable[[], Tensor]]
    )

    def whole_biases(self) -> Mapping[str, Callable[[], Tensor]]:
        return self.biases


def extract_adapter(
    finetuned: str | Path | BaseModel,
    base_model: str | Path | BaseModel,
    rank: int | float | None = None,
    *,
    leave_out: Sequence[str] = (),
    progress: bool | None = None,
) -> ExtractedAdapter:
    """The adapter that turns a base model into a fine-tuned one.

    Both checkpoints are compared tensor by tensor; a difference is computed again each time it is asked for. The
    result can be merged like any adapter, folded, or, with a rank, saved as a LoRA.

    Args:
        finetuned: Path or hub id of a transformers checkpoint in safetensors.
        base_model: What it was trained from, likewise.
        rank: None: every change in full. An integer, or a fraction in (0, 1) of each module's energy to keep: a LoRA
            of the matrices and of the biases beside them; other modules that changed, such as norms, are stored whole
            (PEFT's modules_to_save).
        leave_out: Globs of parameters whose changes are not wanted, such as ``*.bias`` or ``*norm*``.
        progress: Show a bar; default: on a terminal.

    Raises:
        MismatchError: A parameter has another shape in one of them, or belongs to one only in a way that no adapter
            expresses.
        UnsupportedError: A LoRA cannot hold a change; the message names it.
        AdapterError: Nothing has changed.
    """
    choice = parse_rank(rank)
    if not isinstance(choice, Lossless | FixedRank | EnergyFraction):
        raise OptionError(f"rank is {rank!r}; extraction takes an integer, a fraction, or None")
    started = time.perf_counter()
    tuned, base = _opened(finetuned), _opened(base_model)
    comparison = _compare(tuned, base, tuple(leave_out), tracker(progress))
    report = ReportBuilder(comparison.notes)
    entries = {
        _module(name): _entry(tuned, base, name, before)
        for name, before in comparison.changed.items()
    }
    head = _head(tuned, base, comparison, {name.rpartition(".")[0] for name in comparison.new})
    biases: dict[str, Callable[[], Tensor]] = {}
    if not isinstance(choice, Lossless):
        vectors = [
            name
            for name in comparison.changed
            if len(tuned.tensors[tuned.names.files[name]].shape) == 1
        ]
        lora = _as_lora(entries, choice, base, report)
        biases, whole = _vectors(tuned, vectors, lora)
        entries = lora | {name: entries[name] for name in biases}
        head = _head(tuned, base, comparison, whole | set(head.modules))
    return ExtractedAdapter(
        name=Source(tuned.source).name,
        modules=DeltaMapping(entries),
        base_model=base.source,
        head=head,
        report=report.build("extract", "dense", "module", time.perf_counter() - started),
        biases=biases,
    )


def _opened(model: str | Path | BaseModel) -> BaseModel:
    return model if isinstance(model, BaseModel) else open_base_model(model)


@dataclasses.dataclass(frozen=True, slots=True)
class _Comparison:
    """Two checkpoints beside each other; parameters go by the names that the fine-tuned model has in memory.

    Attributes:
        changed: Parameter → its name in the base's files.
        new: Parameters that the base does not have.
        left_out: Parameters whose changes are not wanted → their names in the base's files, if they are there.
        notes: What is not extracted.
    """

    changed: dict[str, str]
    new: list[str]
    left_out: dict[str, str | None]
    notes: list[str]


def _compare(
    tuned: BaseModel, base: BaseModel, leave_out: tuple[str, ...], track: Track
) -> _Comparison:
    changed: dict[str, str] = {}
    new: list[str] = []
    left_out: dict[str, str | None] = {}
    for name in track(tuned.names.files, "compare"):
        before = base.names.in_files(name)
        if before is not None and _same(tuned, base, name, before):
            continue
        if any(fnmatch.fnmatchcase(name, glob) for glob in leave_out):
            left_out[name] = before
        elif before is None:
            new.append(name)
        else:
            changed[name] = before
    _refuse_other_values(tuned, base)
    gone = [name for name in base.names.files if tuned.names.in_files(name) is None]
    if tied := next((name for name in gone if tuned.names.tied(name)), None):
        raise MismatchError(
            f"{tuned.source}: {tied} is tied to another weight, in {base.source} it is its own; save the fine-tuned "
            "model with tie_word_embeddings=false"
        )
    if not (changed or new):
        raise AdapterError(
            f"{tuned.source} and {base.source} hold the same values: nothing to extract"
        )
    notes = [f"left out, as asked for: {', '.join(left_out)}"] if left_out else []
    if gone:
        notes.append(f"{tuned.source} has no {', '.join(gone)}: nothing is extracted of it")
        warnings.warn(notes[-1], stacklevel=3)
    return _Comparison(changed, new, left_out, notes)


def _same(tuned: BaseModel, base: BaseModel, name: str, before: str) -> bool:
    """Whether a parameter has not changed; raises where it cannot have a difference."""
    after = tuned.tensor(tuned.names.files[name])
    values = base.tensor(before)
    if after.shape != values.shape:
        raise MismatchError(
            f"{name} has shape {tuple(after.shape)} in {tuned.source}, {tuple(values.shape)} in {base.source}; "
            "give the base that the model was trained from, its embeddings resized likewise"
        )
    same = torch.equal(after, values.to(after.dtype))
    if not same and not (after.is_floating_point() and after.ndim):
        raise UnsupportedError(
            f"{name} ({after.dtype}, shape {tuple(after.shape)}) has changed, and is no weight: an adapter cannot hold "
            f"that; leave it out: leave_out=[{name!r}]"
        )
    return same


def _refuse_other_values(tuned: BaseModel, base: BaseModel) -> None:
    """What is fused, split or permuted on loading must not have changed: adapters have no name for it."""
    for name in tuned.tensors.keys() & base.tensors.keys() - set(tuned.names.files.values()):
        if not torch.equal(tuned.tensor(name), base.tensor(name)):
            raise UnsupportedError(
                f"{name} has changed, and is not in the files as it is in memory (it is fused, split or permuted when "
                "the model is loaded): an adapter has no name for it"
            )


def _module(parameter: str) -> str:
    """The name of a change: that of the module whose weight it is, or else the parameter's own."""
    return parameter.removesuffix(".weight")


def _entry(tuned: BaseModel, base: BaseModel, name: str, before: str) -> LazyDelta:
    """The change of one parameter."""

    def change() -> Tensor:
        return tuned.tensor(tuned.names.files[name]).float() - base.tensor(before).float()

    shape = base.tensors[before].shape
    if len(shape) == 1:
        return LazyDelta(LowRank, (shape[0], 1), lambda: vector_delta(change()), 1)
    layout = base.layout(_module(name), (1, 1))
    return LazyDelta(
        Dense,
        layout.matrix_shape(shape),
        lambda: Dense(layout.matrix(change()).contiguous(), layout=layout),
    )


def _head(
    tuned: BaseModel, base: BaseModel, comparison: _Comparison, modules: set[str]
) -> Replacements:
    """Modules that are stored whole, with all their parameters; those that are left out as the base has them."""

    def load(name: str) -> Tensor:
        before = comparison.left_out.get(name)
        return (base.tensor(before) if before else tuned.tensor(tuned.names.files[name])).float()

    names = [name for name in tuned.names.files if name.rpartition(".")[0] in modules]
    return Replacements(
        tuple(sorted(modules)),
        {
            name: Parameter(
                tuned.tensors[tuned.names.files[name]].shape, functools.partial(load, name)
            )
            for name in names
        },
    )


def _as_lora(
    entries: Mapping[str, LazyDelta],
    rank: FixedRank | EnergyFraction,
    base: BaseModel,
    report: ReportBuilder,
) -> dict[str, LazyDelta]:
    """The changes of matrices at this rank."""
    lora: dict[str, LazyDelta] = {}
    for module, entry in entries.items():
        if entry.kind is not Dense:
            continue
        _refuse_what_no_lora_holds(module, base)
        delta, energy = truncate(entry.load(), rank)
        lora[module] = LazyDelta(LowRank, entry.shape, lambda delta=delta: delta, rank=delta.rank)
        report.modules[module] = ModuleReport(
            entry.shape, delta.rank, energy, delta.norm(), kept={}, conflicts=0.0
        )
    return lora


def _vectors(
    tuned: BaseModel, vectors: Sequence[str], lora: Container[str]
) -> tuple[dict[str, Callable[[], Tensor]], set[str]]:
    """The biases beside the matrices of a LoRA, and the modules of all other vectors.

    Raises:
        UnsupportedError: PEFT has no place for one.
    """
    biases: dict[str, Callable[[], Tensor]] = {}
    whole: set[str] = set()
    for name in vectors:
        owner, _, kind = name.rpartition(".")
        if (
            f"{owner}.in_proj_weight" in lora
            or f"{owner.rpartition('.')[0]}.in_proj_weight" in lora
        ):
            raise UnsupportedError(
                f"{name} has changed, and PEFT has no place for it beside a LoRA of the same attention; leave it out: "
                f"leave_out=[{name!r}]"
            )
        if kind == "bias" and owner in lora:
            biases[name] = lambda name=name: tuned.tensor(tuned.names.files[name]).float()
        else:
            whole.add(owner)
    return biases, whole


def _refuse_what_no_lora_holds(module: str, base: BaseModel) -> None:
    parameter = base.parameter(module)
    if not parameter.endswith(MATRICES):
        raise UnsupportedError(
            f"{module} has changed, and is a parameter of several dimensions that no layer holds as its weight: "
            "extract it without a rank and fold it, or leave it out"
        )
    if tied := base.names.tied(parameter):
        raise UnsupportedError(
            f"{module} has changed, and is tied to {', '.join(tied)}: PEFT applies a LoRA to one end of it only; save "
            "both models with tie_word_embeddings=false, or leave it out"
        )
