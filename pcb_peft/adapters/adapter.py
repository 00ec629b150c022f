"""An adapter: a lazy mapping from module to delta, that can be saved, or folded into its base model."""

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pcb_peft.adapters.beside import task_file
from pcb_peft.adapters.chosen_head import chosen_head
from pcb_peft.adapters.companions import Companions, bytes_of
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.adapters.expert_stacks import without_fused_layers
from pcb_peft.adapters.folded_files import added_head, folded_files, warn_of_head_beside
from pcb_peft.adapters.has_card import HasCard
from pcb_peft.adapters.saving import FileFormat, save_adapter
from pcb_peft.adapters.source import OpenedAdapter, Source
from pcb_peft.base.architecture import Skeleton
from pcb_peft.base.canonical import names_in_checkpoint
from pcb_peft.base.model import BaseModel, lazy_base, opened_base
from pcb_peft.deltas.dtypes import parse_dtype
from pcb_peft.deltas.replacements import TIES, Replacements, Tied, head_files
from pcb_peft.errors import OptionError
from pcb_peft.formats import Base
from pcb_peft.formats.lazy_delta import scaled
from pcb_peft.images.names import ImageLora
from pcb_peft.runtime.progress import tracker
from pcb_peft.writing.base_gap import BaseGap, MeasuredDeltas
from pcb_peft.writing.edits import fitted
from pcb_peft.writing.fold import check_fold_target, fold_deltas
from pcb_peft.writing.resume import check_resumable
from pcb_peft.writing.targets import Overwrite

AnyAdapter = TypeVar("AnyAdapter", bound="Adapter")


class FoldOptions(NamedTuple):
    """The arguments of `Adapter.fold` beside the base model and the output."""

    tied: Tied | None
    overwrite: Overwrite
    progress: bool | None
    dequantize: bool
    compare_base: str | Path | BaseModel | None
    resume: bool


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Adapter(HasCard):
    """The change that one adapter makes to its base model.

    Attributes:
        name: Name for messages and reports.
        modules: Module path in the base model to delta.
        source: Where the adapter was read, if from files.
        files: The opened files, or tensors in memory, that it was read from.
        reopen: Reads the adapter again beside a base model; None for an adapter that was computed.
        base: The base model that it was read beside.
        base_model: Path or hub id of the base model, as far as it is known.
        revision: Revision of the base model on the Hub.
        task_type: PEFT's task type.
        auto_mapping: The model's class, as PEFT states it for an adapter without a task type.
        scale: Number that the deltas in the files were multiplied by.
        tied: Policy of a fold for tied weights, unless it is given another.
        head: Parameters and rows that the adapter replaces.
        heads: Name of each source of a merged adapter to the parameters that this source replaces.
        inputs: Files and directories that it was made from, which no output may replace.
        companions: Files beside the weights that belong to the model (tokenizer, chat template …), by group.
        licences: Adapter that this was made from to the fields of its card that state its licence.
        base_gap: After a fold with `compare_base`: how far the two base models are from each other.
        image: What is known about a LoRA of an image or video model beside its deltas; None for an adapter of PEFT.
    """

    name: str
    modules: DeltaMapping
    source: Source | None = None
    files: OpenedAdapter | None = None
    reopen: "Callable[[Base], Adapter] | None" = None
    base: Base = None
    base_model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: Mapping[str, Any] | None = None
    scale: float = 1.0
    tied: Tied = TIES[0]
    head: Replacements = dataclasses.field(default_factory=Replacements)
    heads: Mapping[str, Replacements] = dataclasses.field(default_factory=dict[str, Replacements])
    inputs: tuple[str, ...] = ()
    companions: Companions = dataclasses.field(default_factory=dict[str, Mapping[str, Path]])
    licences: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=dict[str, Mapping[str, Any]]
    )
    base_gap: BaseGap | None = None
    image: ImageLora | None = None

    def __repr__(self) -> str:
        kinds = {entry.kind.kind_name for entry in self.modules.entries.values()}
        words = ", ".join(sorted(kinds)) or "no deltas"
        return f"<{type(self).__name__} {self.name!r}: {words}, {len(self.modules)} modules>"

    def on(self, base: Base) -> "Adapter":
        """Return the same adapter, read beside a base model, for deltas that depend on W."""
        return self if self.reopen is None else self.reopen(base).scaled(self.scale)

    def scaled(self, weight: float) -> "Adapter":
        """Return the same adapter with every delta multiplied by a number.

        Heads, embeddings and token rows that the adapter replaces stay as they are. Of a merge this costs nothing: the
        adapters do not compete again.

        Args:
            weight: Any finite number; 0 leaves the base model unchanged, 1 the adapter.

        Returns:
            The scaled adapter.

        Raises:
            OptionError: `weight` is not finite.

        Example:
            >>> from pcb_peft import merge_adapters
            >>> merged = merge_adapters(["math-lora", "code-lora"])
            >>> saved = merged.scaled(1.4).save_pretrained("stronger")
        """
        if not math.isfinite(weight):
            raise OptionError(f"{self.name}: scaled({weight}): the weight must be a finite number")
        if weight == 1:
            return self
        entries = {name: scaled(entry, weight) for name, entry in self.modules.entries.items()}
        scale = self.scale * weight  # no file holds these deltas, so there is no source
        return dataclasses.replace(self, modules=DeltaMapping(entries), source=None, scale=scale)

    def renamed(self, names: Mapping[str, str]) -> "Adapter":
        """Return the same adapter with other names for some modules.

        Args:
            names: Present name of a module to its new one; modules that are not in it keep their names.

        Returns:
            The renamed adapter.

        Raises:
            MismatchError: Two modules would have one name.
        """
        if not names:
            return self
        modules = self.modules.renamed(names, self.name)
        reopen = None if self.reopen is None else functools.partial(_renamed, self.reopen, names)
        return dataclasses.replace(
            self, modules=modules, head=self.head.renamed(names), reopen=reopen
        )

    def with_head(self, name: str) -> "Adapter":
        """Return the same adapter with the head of one task as its own.

        Deltas stay as they are. The heads of the other tasks are left out.

        Args:
            name: The adapter whose head it is: one of `heads`.

        Returns:
            The adapter with that head; its task type is the head's.

        Raises:
            OptionError: There is no head of that name.

        Example:
            >>> from pcb_peft import load_adapter
            >>> classifier = load_adapter("merged").with_head("subj")  # doctest: +SKIP
        """
        kept = chosen_head(self.name, self.head, self.heads, name)
        return dataclasses.replace(
            self,
            head=self.head.joined(kept),
            heads={},
            task_type=kept.task.task_type or self.task_type,
            auto_mapping=kept.task.auto_mapping or self.auto_mapping,
        )

    def split_as(self: AnyAdapter, skeleton: Skeleton) -> AnyAdapter:
        """Return the same adapter with layers that the architecture has split as their parts (q, k and v of qkv)."""
        entries = without_fused_layers(self.modules.entries, skeleton)
        if entries.keys() == self.modules.entries.keys():
            return self
        return dataclasses.replace(self, modules=DeltaMapping(entries), reopen=None)

    def delta(
        self,
        module: str,
        base_model: str | Path | BaseModel | None = None,
        *,
        dequantize: bool = False,
    ) -> Tensor:
        """Return the change that is added to a module's weight W.

        Args:
            module: Path of the module in the base model.
            base_model: Path or hub id of the base model, needed only where ΔW depends on W, as for (IA)³; default:
                the one that the adapter was read or merged beside.
            dequantize: Take a quantised base model; its weights are computed from their codes.

        Returns:
            ΔW, float32, in W's own orientation: (out, in) for Linear, (in, out) for Conv1D. The base model says which
            it is; without one, the adapter's configuration does, in which PEFT writes the same for all modules.

        Raises:
            KeyError: The adapter does not touch that module.
            BaseModelError: W is needed.
            MismatchError: The base model does not have this module, or has it in another shape.

        Example:
            >>> from pcb_peft import load_adapter
            >>> delta = load_adapter("math-lora").delta("model.layers.0.self_attn.q_proj")
            >>> delta.ndim, delta.dtype
            (2, torch.float32)
        """
        base = lazy_base(base_model, dequantize=dequantize)
        entry = self.modules.entries.get(module)
        if base is None and self.base is not None and entry is not None and entry.kind.multiplies:
            base = lazy_base(given) if isinstance(given := self.base(), BaseModel) else None
        if base is None:
            return self.modules[module].delta()
        delta = self.on(base).modules[module]
        if replaced := self.head.parameters.get(f"{module}.weight"):
            return fitted(delta, module, base(), replaced.shape).delta(replaced())
        return fitted(delta, module, base()).delta(base().weight(module))

    def save_pretrained(
        self: AnyAdapter,
        directory: str | Path,
        *,
        dtype: str | torch.dtype = torch.float32,
        rank_pattern: bool = False,
        overwrite: Overwrite = False,
        format: FileFormat | None = None,  # noqa: A002  (as it is called where people ask for it)
    ) -> AnyAdapter:
        """Write a PEFT adapter that `PeftModel.from_pretrained` loads, whole or not at all.

        The scaling is multiplied into the factors (r = lora_alpha, the same for all modules), so that every program
        reads it alike. Where the base model's configuration is on this machine, the installed PEFT looks the modules up
        in its architecture first.

        Args:
            directory: Directory to write; for a LoRA of an image model also a file: "merged.safetensors".
            dtype: Dtype of the tensors, such as "bfloat16"; they are rounded to it once.
            rank_pattern: Let every module of a LoRA have its own rank instead of padding it with zeros.
            overwrite: Replace a directory that is not empty: True, if this package wrote all of it; "all", anything.
            format: "peft", or for an image model "diffusers", "kohya" or "comfyui". Default: as it came.

        Returns:
            The adapter. The report of a merge now says how many modules PEFT finds.

        Raises:
            UnsupportedError: The deltas are dense, or of several kinds.
            MismatchError: PEFT would not find a module in the base model.
            OptionError: The dtype cannot hold the values, or is not one of weights; `rank_pattern` without ranks.
            OutputError: The directory cannot be written, must not be replaced, contains what the adapter was read
                from, or lies in it.

        Example:
            >>> from pcb_peft import merge_adapters
            >>> merged = merge_adapters(["math-lora", "code-lora"])
            >>> saved = merged.save_pretrained("merged", dtype="bfloat16")
        """
        saved = self.in_format(format)
        notes = save_adapter(
            saved,
            Path(directory),
            parse_dtype(dtype),
            rank_pattern=rank_pattern,
            overwrite=overwrite,
            file_format=format or self.file_format,
        )
        return saved.noted(notes)

    def fold(
        self,
        base_model: str | Path | BaseModel,
        output: str | Path,
        *,
        tied: Tied | None = None,
        overwrite: Overwrite = False,
        progress: bool | None = None,
        dequantize: bool = False,
        compare_base: str | Path | BaseModel | None = None,
        resume: bool = False,
    ) -> "Adapter":
        """Write the base model with W + ΔW in the place of W, shard by shard.

        Parameters that the adapter replaces (its head) are written too. Where the base model has no place for a
        classifier, the folded model has one: its class is the classifier's.

        Args:
            base_model: Path or hub id, in safetensors: a model of transformers, a pipeline of diffusers, or one file.
            output: Directory to write; a file, if the base model is one.
            tied: Policy for tied weights that would change differently at their two ends: "refuse"; "untie": each has
                weights of its own from then on, as with the adapter in PEFT; "both": both change. Default: the
                merge's policy, else "refuse".
            overwrite: Replace a directory that is not empty: True, if this package wrote all of it; "all", anything.
            progress: Show a bar; default: on a terminal.
            dequantize: Take a quantised base model; the folded model is bfloat16.
            compare_base: The same model with, or without, quantisation: `base_gap` then has the distance to it.
            resume: Go on from the whole shards that a killed run of the same fold left; leave them if this one ends.

        Returns:
            The adapter. After a merge with rank "full" its report now covers all modules.

        Raises:
            MismatchError: The base model does not have these modules, or has them in other shapes.
            BaseModelError: Tied weights would change differently, and the policy refuses it; or the base model is
                quantised, and `dequantize` is not set.
            OutputError: The directory cannot be written, must not be replaced, contains what the adapter was read
                from, or lies in it.
            OptionError: `resume` of an adapter in memory, which no run knows again, or beside `compare_base`.

        Example:
            >>> from pcb_peft import load_adapter
            >>> folded = load_adapter("math-lora").fold("base-model", "math-model-again")
        """
        options = FoldOptions(tied, overwrite, progress, dequantize, compare_base, resume)
        return self._folded(base_model, output, options, {})

    def _folded(
        self,
        base_model: str | Path | BaseModel,
        output: str | Path,
        options: FoldOptions,
        facts: dict[str, Any],
    ) -> "Adapter":
        """Do what `fold` does; `facts` are plain data by module that the deltas fill while they are read."""
        tied, overwrite, progress, dequantize, compare_base, resume = options
        check_fold_target(Path(output), overwrite=overwrite, inputs=self.inputs)
        check_resumable(self.name, self.identity(), compare_base, resume=resume)
        base = opened_base(base_model, dequantize=dequantize)
        policy = tied or self.tied
        if policy not in TIES:
            raise OptionError(f"tied is {policy!r}; it must be one of {', '.join(TIES)}")
        other = None if compare_base is None else opened_base(compare_base, dequantize=True)
        adapter = self.on(lazy_base(base))
        adapter = adapter.split_as(base.names.skeleton)
        adapter = adapter.renamed(names_in_checkpoint(base, adapter.modules))
        replaced = adapter.head.within(base.names.stores)
        rest = adapter.head.without(replaced.parameters)
        added = added_head(rest, base, self.task_type, self.auto_mapping)
        deltas = MeasuredDeltas(adapter.modules, base, other)
        fold_deltas(
            deltas,
            base,
            output,
            replaced=replaced,
            added=added,
            tied=policy,
            extra_files=folded_files(
                self.name, self.companions, base, replaced, self.folded_card(base)
            )
            | self.companion_files(without={*replaced.parameters, *added.parameters}),
            files_at_end=lambda: self.files_at_end(facts, None if other is None else deltas.gap()),
            facts=facts,
            overwrite=overwrite,
            progress=tracker(progress),
            identity=self.identity(),
            resume=resume,
        )
        if rest.parameters and not added.parameters:
            warn_of_head_beside(self.name, rest, base)
        return self if other is None else dataclasses.replace(self, base_gap=deltas.gap())

    def identity(self) -> str | None:
        """Return a text by which the deltas are known in another run; None for an adapter in memory."""
        if self.files is None or self.files.sha256 is None:
            return None
        return f"{self.files.sha256} {self.files.config_sha256} {self.scale}"

    def whole_biases(self) -> Mapping[str, Callable[[], Tensor]]:
        """Return functions that read the biases that PEFT stores whole, where a LoRA has no room for their changes."""
        return {}

    def companion_files(self, without: Container[str] | None = None) -> dict[str, bytes]:
        """Return the files that stand beside the weights, by name.

        Args:
            without: Parameters that a folded base model holds itself. The others are in a file beside it; an adapter
                (None) holds its own head.
        """
        if without is not None:
            return head_files({self.name: self.head.without(without)} | dict(self.heads))
        beside = bytes_of(self.companions)
        return beside | task_file(self.head.task.labels) | head_files(self.heads)


def _renamed(
    reopen: Callable[[Base], "Adapter"], names: Mapping[str, str], base: Base
) -> "Adapter":
    return reopen(base).renamed(names)
