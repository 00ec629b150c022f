"""The result of a merge: an adapter that knows how it was made."""

import dataclasses
import functools
import html
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from pcb_peft.adapters.adapter import Adapter, FoldOptions
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.adapters.saving import REPORT_FILE, FileFormat
from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.delta import Delta
from pcb_peft.deltas.replacements import Tied
from pcb_peft.formats import LazyDelta, Weights
from pcb_peft.merging.card import merge_card
from pcb_peft.merging.finish import PendingModule
from pcb_peft.merging.heads import notes_with_head
from pcb_peft.merging.report import ModuleReport, Report
from pcb_peft.merging.report_file import report_json
from pcb_peft.recipes.recipe import FILE_NAME, Recipe
from pcb_peft.recipes.weights import plain
from pcb_peft.runtime.processes import current, union
from pcb_peft.runtime.shown import counted
from pcb_peft.writing.base_gap import BaseGap
from pcb_peft.writing.model_card import Facts
from pcb_peft.writing.targets import Overwrite


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class MergedAdapter(Adapter):
    """A merged adapter; it can be saved, folded, pickled, and merged again.

    Attributes:
        recipe: Everything that is needed to make it again.
        report: What was decided and what it cost.
        pending: The modules that are merged when they are asked for (rank "full").
    """

    recipe: Recipe
    report: Report
    pending: Mapping[str, PendingModule] = dataclasses.field(
        default_factory=dict[str, PendingModule]
    )

    def __repr__(self) -> str:
        return f"<MergedAdapter: {self._summary}>"

    def _repr_html_(self) -> str:
        """The merged adapter in a notebook."""
        weights = plain(self.recipe.weights)
        rows = "".join(
            f"<tr><td>{html.escape(source.name)}</td><td>{html.escape(str(weight))}</td></tr>"
            for source, weight in zip(self.recipe.adapters, weights, strict=True)
        )
        table = f"<table><tr><th>adapter</th><th>weight</th></tr>{rows}</table>"
        return f"<p>{html.escape(self._summary)}</p>{table}{self.report.to_html()}"

    @property
    def _summary(self) -> str:
        recipe, ranks = self.recipe, [entry.rank for entry in self.modules.entries.values()]
        rank = max((rank for rank in ranks if rank is not None), default=None)
        adapters, modules = counted(len(recipe.adapters), "adapter"), counted(len(ranks), "module")
        of_rank = "" if rank is None else f" of rank {rank}"
        base = "" if self.base_model is None else f", base model {self.base_model}"
        return f"{adapters} merged with {recipe.method} in {recipe.space} space, {modules}{of_rank}{base}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out pending modules: they are merged again from what `pending` holds."""
        state = dict(self.__dict__)
        if self.pending:
            del state["modules"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        pending: Mapping[str, PendingModule] = state["pending"]
        if pending:
            state["modules"] = _pending_deltas(pending)
        self.__dict__.update(state)

    def scaled(self, weight: float) -> "MergedAdapter":
        scaled = super().scaled(weight)
        if scaled is self:
            return self
        report = dataclasses.replace(
            self.report,
            modules={module: line.scaled(weight) for module, line in self.report.modules.items()},
            notes=(*self.report.notes, f"all deltas are multiplied by {weight:g}"),
        )
        pending = {module: one.scaled(weight) for module, one in self.pending.items()}
        return dataclasses.replace(
            self,
            modules=_pending_deltas(pending) if pending else scaled.modules,
            scale=scaled.scale,
            recipe=dataclasses.replace(self.recipe, scale=self.recipe.scale * weight),
            report=report,
            pending=pending,
        )

    def counted(self) -> "MergedAdapter":
        """Return the adapter with a report on all its modules.

        After a merge with rank "full", each module is merged once for it, and not kept; `fold` returns such a report,
        too. After any other merge the report is complete already.

        Returns:
            The adapter, with its complete report.

        Example:
            print(merge_adapters(["math-lora", "code-lora"], rank="full").counted().report)
        """
        if not self.report.pending:
            return self
        return self._with_lines({name: one().line for name, one in self.pending.items()})

    def _with_lines(self, lines: Mapping[str, ModuleReport]) -> "MergedAdapter":
        known = {name: lines[name] for name in self.modules if name in lines}
        pending = len(self.modules) - len(known)
        report = dataclasses.replace(self.report, modules=known, pending=pending)
        return dataclasses.replace(self, report=report)

    def with_head(self, name: str) -> "MergedAdapter":
        chosen = super().with_head(name)
        notes = notes_with_head(self.report.notes, name, self.heads[name].modules)
        return dataclasses.replace(
            self,
            head=chosen.head,
            heads=chosen.heads,
            task_type=chosen.task_type,
            auto_mapping=chosen.auto_mapping,
            recipe=dataclasses.replace(self.recipe, head=name),
            report=dataclasses.replace(self.report, notes=notes),
        )

    def in_format(self, file_format: FileFormat | None) -> "MergedAdapter":
        if file_format is None:
            return self
        return dataclasses.replace(
            self, recipe=dataclasses.replace(self.recipe, format=file_format)
        )

    @property
    def file_format(self) -> FileFormat:
        return cast("FileFormat", self.recipe.format) if self.recipe.format else super().file_format

    def whole_biases(self) -> Mapping[str, Callable[[], Tensor]]:
        entries = self.modules.entries
        biases = {name: entry for name, entry in entries.items() if name.endswith(".bias")}
        changed = {name.removesuffix(".bias") for name in biases}
        weights = entries.keys() - biases.keys()
        rescaled = any(entries[name].kind.rescales for name in weights)
        fits = changed == weights and not rescaled  # a LoRA changes all biases or none, a DoRA none
        if not weights or fits or self.base is None:
            return {}
        return {name: functools.partial(_whole, name, e, self.base) for name, e in biases.items()}

    def fold(
        self,
        base_model: str | Path | BaseModel,
        output: str | Path,
        *,
        tied: Tied | None = None,
        overwrite: Overwrite = False,
        progress: bool | None = None,
        dequantize: bool | None = None,
        compare_base: str | Path | BaseModel | None = None,
        resume: bool = False,
    ) -> "MergedAdapter":
        """Write the base model with the merge in its weights, as `Adapter.fold` does.

        Args:
            base_model: As there, and so are the other arguments.
            output: Directory to write.
            tied: Default: the recipe's policy.
            overwrite: Replace a directory that is not empty.
            progress: Show a bar.
            dequantize: Take a quantised base model; default: what the recipe says.
            compare_base: The same model with or without quantisation.
            resume: Go on from what a killed run of the same fold left.

        Returns:
            The merged adapter; its report covers all modules, and with `compare_base` says how far apart the two are.

        Raises:
            PcbPeftError: What `Adapter.fold` raises.

        Example:
            >>> from pcb_peft import merge_adapters
            >>> merged = merge_adapters(["math-lora", "code-lora"], rank="full", progress=False)
            >>> merged.fold("base-model", "merged-model", progress=False).report.pending
            0
        """
        facts: dict[str, Any] = {}
        watched = {
            name: dataclasses.replace(one.entry, load=functools.partial(_noted, one, name, facts))
            for name, one in self.pending.items()
        }
        modules = DeltaMapping(watched) if watched else self.modules
        quantised = self.recipe.dequantize if dequantize is None else dequantize
        options = FoldOptions(tied, overwrite, progress, quantised, compare_base, resume)
        counting = dataclasses.replace(self, modules=modules)
        folded = counting._folded(base_model, output, options, facts)
        return self._after_fold(facts, folded.base_gap)

    def _after_fold(self, facts: dict[str, Any], gap: BaseGap | None) -> "MergedAdapter":
        """Return the merge with a report that says what a fold has learned; all processes come here."""
        done = self if gap is None else self._with_gap(gap)
        if not self.pending:
            return done
        lines = union(current().all_gather(facts))
        return done._with_lines({n: ModuleReport.from_plain(line) for n, line in lines.items()})

    def files_at_end(self, facts: dict[str, Any], gap: BaseGap | None) -> Mapping[str, bytes]:
        return {REPORT_FILE: self._after_fold(facts, gap)._report_json().encode()}

    def _with_gap(self, gap: BaseGap) -> "MergedAdapter":
        """The same merge, with the distance between two base models in its report."""
        report = dataclasses.replace(self.report, notes=(*self.report.notes, str(gap)))
        return dataclasses.replace(self, report=report, base_gap=gap)

    def identity(self) -> str | None:
        recipe = self.recipe
        sources = [
            *recipe.adapters,
            *recipe.statistics,
            *([recipe.metric] if recipe.metric else []),
        ]
        return recipe.to_yaml() if all(source.sha256 for source in sources) else None

    def noted(self, notes: Sequence[str]) -> "MergedAdapter":
        report = dataclasses.replace(self.report, notes=(*self.report.notes, *notes))
        return dataclasses.replace(self, report=report)

    def companion_files(self, without: Container[str] | None = None) -> dict[str, bytes]:
        made = {
            FILE_NAME: self.recipe.to_yaml().encode(),
            REPORT_FILE: self._report_json().encode(),
        }
        return made | super().companion_files(without)

    def _report_json(self) -> str:
        local = [*self.inputs, *([self.base_model] if self.base_model else [])]
        return report_json(self.report, self.recipe, local)

    def card_parts(self) -> tuple[str, Facts, dict[str, str]]:
        return merge_card(self, self.recipe, self.report.energy)


def _pending_deltas(pending: Mapping[str, PendingModule]) -> DeltaMapping:
    return DeltaMapping({module: one.entry for module, one in pending.items()})


def _noted(pending: PendingModule, name: str, facts: dict[str, Any]) -> Delta:
    """Merge a module, and note its line for the report."""
    done = pending()
    facts[name] = dataclasses.asdict(done.line)
    return done.delta


def _whole(name: str, entry: LazyDelta, base: Callable[[], Weights]) -> Tensor:
    """A bias with its change."""
    return base().weight(name).float() + entry.load().delta()
