"""The result of a merge: an adapter that knows how it was made."""

import dataclasses
import functools
from collections.abc import Callable, Container, Mapping
from pathlib import Path

from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.delta import Delta, Rescaled
from pcb_peft.formats import LazyDelta, Weights
from pcb_peft.merging.report import ModuleReport, Report
from pcb_peft.recipes.recipe import FILE_NAME, Recipe, in_words
from pcb_peft.runtime.processes import current, union
from pcb_peft.writing.model_card import model_card, public_name


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MergedAdapter(Adapter):
    """A merged adapter.

    Attributes:
        recipe: Everything that is needed to make it again.
        report: What was decided and what it cost.
    """

    recipe: Recipe
    report: Report

    def scaled(self, weight: float) -> "MergedAdapter":
        scaled = super().scaled(weight)
        if scaled is self:
            return self
        notes = [*self.report.notes, f"all deltas are multiplied by {weight:g}"]
        lines = self.report.modules
        report = dataclasses.replace(
            self.report,
            modules={m: _louder(line, weight) for m, line in lines.items()},
            notes=notes,
        )
        entries = {
            module: dataclasses.replace(
                entry, load=functools.partial(_reported, entry, module, weight, lines, report)
            )
            for module, entry in scaled.modules.entries.items()
        }
        recipe = dataclasses.replace(self.recipe, scale=self.recipe.scale * weight)
        return dataclasses.replace(
            self, modules=DeltaMapping(entries), scale=scaled.scale, recipe=recipe, report=report
        )

    def whole_biases(self) -> Mapping[str, Callable[[], Tensor]]:
        entries = self.modules.entries
        biases = {name: entry for name, entry in entries.items() if name.endswith(".bias")}
        changed = {name.removesuffix(".bias") for name in biases}
        rest = entries.keys() - biases.keys()
        rescaled = any(entries[name].kind is Rescaled for name in rest)
        held = changed == rest and not rescaled  # a LoRA changes all biases or none, a DoRA none
        if not rest or held or self.base is None:
            return {}
        return {name: functools.partial(_whole, name, e, self.base) for name, e in biases.items()}

    def fold(
        self,
        base_model: str | Path | BaseModel,
        output: str | Path,
        *,
        tied: str | None = None,
        overwrite: bool = False,
        progress: bool | None = None,
    ) -> None:
        super().fold(base_model, output, tied=tied, overwrite=overwrite, progress=progress)
        lines = union(current().all_gather(self.report.modules))
        self.report.modules = {module: lines[module] for module in self.modules if module in lines}

    def companion_files(self, without: Container[str] | None = None) -> dict[str, bytes]:
        return {FILE_NAME: self.recipe.to_yaml().encode(), **super().companion_files(without)}

    def card(self, peft_type: str) -> str:
        recipe, report = self.recipe, self.report
        sources = [
            (public_name(source.path) or source.name, weight)
            for source, weight in zip(recipe.adapters, recipe.weights or (), strict=True)
        ]
        settings = {
            "method": recipe.method,
            "space": recipe.space,
            "scope": recipe.scope,
            **{
                when: in_words(some)
                for when, some in (("before", recipe.before), ("after", recipe.after))
                if some
            },
            **{name: value for name, value in recipe.options.items() if value is not None},
            **({} if recipe.scale == 1 else {"scale": recipe.scale}),
            "retained energy": f"{report.energy:.4f}",
        }
        return model_card(
            title=f"{len(sources)} adapters merged with {recipe.method}",
            base_model=self.base_model,
            task_type=self.task_type,
            tags=[peft_type.lower(), "transformers"],
            sources=sources,
            settings=list(settings.items()),
        )


def _louder(line: ModuleReport, weight: float) -> ModuleReport:
    return dataclasses.replace(line, norm=abs(weight) * line.norm)


def _reported(
    entry: LazyDelta, module: str, weight: float, lines: Mapping[str, ModuleReport], report: Report
) -> Delta:
    """A scaled delta; its line goes into the report, because a dense merge writes its lines only now."""
    delta = entry.load()
    if module in lines:
        report.modules[module] = _louder(lines[module], weight)
    return delta


def _whole(name: str, entry: LazyDelta, base: Callable[[], Weights]) -> Tensor:
    """A bias with its change."""
    return base().weight(name).float() + entry.load().delta()
