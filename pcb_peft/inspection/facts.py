"""Facts about one adapter, and the screen that shows them."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from pcb_peft.base.paths import layer_labels, target_of
from pcb_peft.merging.evaluation_file import Measured
from pcb_peft.merging.report import Report
from pcb_peft.runtime.shown import counted, some_of
from pcb_peft.runtime.tables import bars, table
from pcb_peft.runtime.units import format_size

FOLDED = "folded model"
SHOWN = 6
"""Names that a line of the screen has at most."""
FEW_RANKS = 4
"""More ranks than these are shown as a range."""
MOST_BARS = 64
"""Bars that a line of the screen has at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleFacts:
    """One module of an adapter.

    Attributes:
        kind: Kind of its change, such as "LoRA".
        shape: (out, in) of ΔW.
        rank: Rank of a low-rank change, as it is stored; None for others.
        norm: ‖ΔW‖_F; of an (IA)³ ‖l − 1‖, of a DoRA that of its low-rank part.
        effective_rank: Number of directions that carry it; None where it is not known.
        problem: Why it cannot be read; empty where it can.
        needs_base: True if it can be read beside the base model only, which was not given.
    """

    kind: str
    shape: tuple[int, int]
    rank: int | None
    norm: float
    effective_rank: float | None
    problem: str = ""
    needs_base: bool = False


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Inspection:
    """One adapter. ``print`` it for one screen.

    Attributes:
        name: Its name.
        path: Where it was read; None for an adapter in memory.
        tuner: PEFT's type, such as "LORA"; "folded model" for a model that a merge was folded into.
        task_type: PEFT's task type.
        base_model: Path or hub id of the base model, as the adapter names it.
        revision: Revision of the base model.
        config: The adapter's configuration.
        modules: Facts by module path.
        replaced: Shape of each parameter that it replaces, such as a classifier.
        token_rows: Number of token rows that it replaces, by module.
        labels: Names of the classes of its head, in the order of the head's rows.
        heads: Names of the heads that are kept beside a merged adapter.
        companions: Files of a tokenizer and the like beside it.
        bytes: Size of its files; None for an adapter in memory.
        made: The report of the merge that made it, if it is one.
        evaluation: What `evaluate` wrote beside it, if it did.
        warnings: What looks wrong, in words.
    """

    name: str
    path: str | None
    tuner: str
    task_type: str | None = None
    base_model: str | None = None
    revision: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    modules: Mapping[str, ModuleFacts] = dataclasses.field(default_factory=dict[str, ModuleFacts])
    replaced: Mapping[str, tuple[int, ...]] = dataclasses.field(
        default_factory=dict[str, tuple[int, ...]]
    )
    token_rows: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    labels: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    bytes: int | None = None
    made: Report | None = None
    evaluation: Measured | None = None
    warnings: tuple[str, ...] = ()

    @property
    def norm(self) -> float:
        """‖ΔW‖ over all modules."""
        return total_norm(self.modules.values())

    @property
    def ranks(self) -> dict[int, int]:
        """Number of modules by rank."""
        ranks = (facts.rank for facts in self.modules.values() if facts.rank is not None)
        return dict(sorted(Counter(ranks).items()))

    @property
    def by_target(self) -> dict[str, list[ModuleFacts]]:
        """Modules by the last part of their path, such as q_proj; of an expert, by its name without numbers."""
        groups: dict[str, list[ModuleFacts]] = {}
        for module, facts in self.modules.items():
            groups.setdefault(target_of(module), []).append(facts)
        return dict(sorted(groups.items()))

    @property
    def by_layer(self) -> dict[str, float]:
        """‖ΔW‖ of each layer: "0", or "encoder 0" where the model has several lists of layers."""
        groups: dict[str, list[ModuleFacts]] = {}
        for module, layer in layer_labels(self.modules).items():
            groups.setdefault(layer, []).append(self.modules[module])
        return {layer: total_norm(group) for layer, group in groups.items()}

    @property
    def scaling(self) -> float | None:
        """alpha/r, or alpha/√r with rsLoRA, as the configuration says; None where it says neither."""
        alpha, rank = self.config.get("lora_alpha"), self.config.get("r")
        if not (isinstance(alpha, int | float) and isinstance(rank, int) and rank > 0):
            return None
        return alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        totals = {name: getattr(self, name) for name in ("norm", "ranks", "by_layer")}
        made = self.made and self.made.as_dict()
        evaluation = msgspec.to_builtins(self.evaluation)
        facts = dataclasses.asdict(dataclasses.replace(self, made=None, evaluation=None))
        return {**facts, **totals, "made": made, "evaluation": evaluation}

    def __str__(self) -> str:
        return inspection_text(self)

    def __repr__(self) -> str:
        return f"<Inspection of {self.name!r}: {self.tuner}, {len(self.modules)} modules>"


def total_norm(modules: Iterable[ModuleFacts]) -> float:
    """Return ‖ΔW‖ over some modules."""
    return math.sqrt(math.fsum(facts.norm**2 for facts in modules))


def inspection_text(facts: Inspection) -> str:
    """Return the screen: what the adapter is, where it changes its base model, what looks wrong."""
    adapter = [_identity(facts), _targets(facts), _depth(facts)] if facts.modules else []
    made = "" if facts.made is None else f"made by this merge:\n{facts.made}"
    blocks = [_title(facts), *adapter, _beside(facts), made, _evaluated(facts)]
    warnings = "\n".join(f"! {warning}" for warning in facts.warnings)
    return "\n\n".join(block for block in [*blocks, warnings] if block)


def _evaluated(facts: Inspection) -> str:
    """Return the table of the evaluation, lost tasks first."""
    if facts.evaluation is None:
        return ""
    rows = [
        (
            line.task,
            *(line.shown(value) for value in (line.base, line.adapter, line.merged)),
            "–" if line.kept is None else f"{line.kept:.1%}",
            line.verdict,
        )
        for line in sorted(facts.evaluation.tasks, key=lambda line: not line.lost)
    ]
    header = ("evaluation", "base", "adapter", "merge", "kept", "verdict")
    return table(header, rows, words_last=True)


def _title(facts: Inspection) -> str:
    kinds = " and ".join(sorted({one.kind for one in facts.modules.values()})) or "no deltas"
    size = "" if facts.bytes is None else f", {format_size(facts.bytes)}"
    if facts.tuner == FOLDED:
        return f"{facts.name}: a model with a merge folded into its weights{size}"
    return f"{facts.name}: {kinds} on {counted(len(facts.modules), 'module')}{size}"


def _identity(facts: Inspection) -> str:
    base = facts.base_model or "not named in the adapter"
    revision = f", revision {facts.revision}" if facts.revision else ""
    lines = {
        "base model": base + revision,
        "task type": facts.task_type,
        "rank": _ranks(facts.ranks),
        "scaling": _scaling(facts),
        "replaces": _replaced(facts),
        "labels": some_of(facts.labels, SHOWN),
        "heads": some_of(facts.heads, SHOWN),
    }
    return "\n".join(f"{name:<11} {line}" for name, line in lines.items() if line)


def _ranks(ranks: Mapping[int, int]) -> str:
    if len(ranks) > FEW_RANKS:
        return f"{min(ranks)} to {max(ranks)} ({sum(ranks.values())} modules)"
    return ", ".join(f"{rank} ({counted(count, 'module')})" for rank, count in ranks.items())


def _scaling(facts: Inspection) -> str:
    config, value = facts.config, facts.scaling
    if value is None:
        return ""
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    formula = "alpha/√r, rsLoRA" if config.get("use_rslora") else "alpha/r"
    others = f"; other modules by {' and '.join(patterns)}" if patterns else ""
    return f"{value:.4g} ({formula}, alpha {config['lora_alpha']:g}){others}"


def _replaced(facts: Inspection) -> str:
    parameters = [f"{name} {' x '.join(map(str, shape))}" for name, shape in facts.replaced.items()]
    rows = [f"{count} token rows of {module}" for module, count in facts.token_rows.items()]
    return some_of([*parameters, *rows], SHOWN)


def _targets(facts: Inspection) -> str:
    rows = [
        (
            target,
            str(len(group)),
            _shape(group),
            "-" if any(one.problem for one in group) else f"{total_norm(group):.4g}",
            _mean_effective_rank(group),
        )
        for target, group in facts.by_target.items()
    ]
    return table(("target", "modules", "shape", "norm", "effective rank"), rows)


def _shape(group: Sequence[ModuleFacts]) -> str:
    shapes = {one.shape for one in group}
    return " x ".join(map(str, group[0].shape)) if len(shapes) == 1 else f"{len(shapes)} shapes"


def _mean_effective_rank(group: Sequence[ModuleFacts]) -> str:
    known = [one.effective_rank for one in group if one.effective_rank is not None]
    return f"{math.fsum(known) / len(known):.1f}" if known else "-"


def _depth(facts: Inspection) -> str:
    """One bar per layer, and one line per list of layers; nothing where some norms are not known."""
    if any(one.problem for one in facts.modules.values()):
        return ""
    lists: dict[str, dict[str, float]] = {}
    for layer, norm in facts.by_layer.items():
        name, _, number = layer.rpartition(" ")
        lists.setdefault(name or "layer", {})[number] = norm
    rows = [
        (
            f"norm, {name} {next(iter(norms))} to {next(reversed(norms))}",
            _bars(list(norms.values())),
        )
        for name, norms in lists.items()
        if len(norms) > 1
    ]
    width = max((len(words) for words, _ in rows), default=0)
    return "\n".join(f"{words:<{width}}  {line}" for words, line in rows)


def _bars(norms: Sequence[float]) -> str:
    """One bar per layer, or per some neighbours where there are too many for one line."""
    together = math.ceil(len(norms) / MOST_BARS)
    groups = (norms[i : i + together] for i in range(0, len(norms), together))
    return bars([math.hypot(*group) for group in groups])


def _beside(facts: Inspection) -> str:
    return f"beside it: {', '.join(facts.companions)}" if facts.companions else ""
