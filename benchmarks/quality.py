"""Measure how much of each task a merge keeps: accuracy on held-out texts, relative to the task's own adapter.

    python benchmarks/quality.py "linear" "pcb space=knots|core density=0.1|0.2" --limit 100
    python benchmarks/quality.py pcb flat --together 2

The first measures these settings on the example adapters, with the validation texts beside this script, the second on
every pair of them. The tables in ``docs/methods.md`` were printed by it.

A setting is a method with arguments of `merge_adapters`. ``|`` separates alternatives; every combination is measured,
with every weight at 1 and at the best common weight. (All weights times s give s times the merged delta, so only the
encoder runs again.) The search starts at 1 and goes through ``--scales`` in the direction that improves the mean, as
long as it improves. A calibration is written as on the command line, ``after=response:least=0.7``; ``distill=64``
distils the merge on so many texts of each task, from ``--training``.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from quality_tables import Result, Score, line_of_subsets, table, table_of_subsets
from torch import Tensor

from pcb_peft import TaskStatistics, collect_statistics, distill_merge, get_method, merge_adapters
from pcb_peft.commands import demo
from pcb_peft.commands.arguments import parse_step
from pcb_peft.errors import PcbPeftError
from pcb_peft.evaluation import classification
from pcb_peft.recipes.peft_aliases import method_of

SCALES = (0.3, 0.5, 0.7, 1.0, 1.3, 1.6, 2.2)
SETTINGS = (
    "linear",
    "ties density=0.2 space=dense|core|knots scope=global",
    "pcb space=knots|core|dense|factor scope=global|module formula=es density=0.2",
    "pcb space=knots scope=module formula=paper|reference|nlp|vision|es density=0.1",
    "pcb space=knots scope=module formula=es density=0.05|0.1|0.3|0.5",
)

Deltas = dict[str, Tensor]  # by the name of the parameter
Model = Any  # a transformers model


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One way to merge.

    Attributes:
        label: What the table calls it.
        options: Arguments of `merge_adapters`.
    """

    label: str
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Texts:
    """Where unlabelled texts of the tasks are, for what needs them.

    Attributes:
        folder: With ``<task>.jsonl``, or with ``<task>/<split>.jsonl``.
        split: Which file of a task's folder.
    """

    folder: Path
    split: str

    def of(self, task: str) -> Path:
        """Return the file of a task."""
        flat = self.folder / f"{task}.jsonl"
        return flat if flat.exists() else self.folder / task / f"{self.split}.jsonl"


class Bench:
    """One model, the tasks' tokens, and what each adapter reaches alone."""

    def __init__(
        self,
        tasks: list[classification.Task],
        base: Path,
        training: Texts,
        *,
        bfloat16: bool = False,
    ) -> None:
        self.training = training
        self.tasks = tasks
        self.base = base
        self.bfloat16 = bfloat16
        self.model: Model = classification.load_base(base)
        tokenizer = classification.load_tokenizer(base)
        self.batches = [classification.make_batches(tokenizer, task.texts) for task in tasks]
        self.own = [
            self._accuracy(
                classification.load_with_peft(base, task.adapter, len(task.labels)), index
            )
            for index, task in enumerate(tasks)
        ]

    def score(self, deltas: Deltas, scale: float) -> Score:
        """Add the deltas, run the encoder once per task, take the deltas away."""
        return self._score(deltas, scale, self.everything)

    def _score(self, deltas: Deltas, scale: float, indices: Sequence[int]) -> Score:
        with added(self.model, deltas, scale):
            return Score(tuple(self._accuracy(self.model, i) / self.own[i] for i in indices))

    @property
    def everything(self) -> Sequence[int]:
        """All tasks, by number."""
        return range(len(self.tasks))

    def measure(self, setting: Setting, scales: tuple[float, ...]) -> Result:
        """Merge once; score the merge at weight 1 and on the way to its best common weight."""
        self._statistics(setting, self.everything)  # not part of the merge
        begin = time.perf_counter()
        deltas = self.merge(setting, self.everything)
        seconds = time.perf_counter() - begin
        scores = climb(lambda scale: self.score(deltas, scale), scales)
        return Result(setting.label, scores, seconds)

    def together(self, setting: Setting, count: int) -> list[Score]:
        """Merge every `count` of the adapters at weight 1, and score each merge on their own tasks."""
        subsets = itertools.combinations(self.everything, count)
        return [self._score(self.merge(setting, some), 1.0, some) for some in subsets]

    def merge(self, setting: Setting, indices: Sequence[int]) -> Deltas:
        """Merge the adapters of these tasks, and return what is added to each parameter."""
        adapters = [self.tasks[index].adapter for index in indices]
        options = dict(setting.options)
        texts = options.pop("distill", None)
        if "metric" in options:
            options["base_model"] = self.base
        options |= self._statistics(setting, indices)
        merged: Any = merge_adapters(adapters, progress=False, **options)
        if texts:
            files = [self.training.of(self.tasks[index].name) for index in indices]
            merged = distill_merge(merged, adapters, files, self.base, limit=texts, progress=False)
        if (self.tasks[0].adapter / "adapter_config.json").read_text("utf-8").count('"IA3"'):
            return self._multiplied(merged)
        return {f"{module}.weight": merged.delta(module) for module in merged.modules}

    def _statistics(
        self, setting: Setting, indices: Sequence[int]
    ) -> dict[str, list[TaskStatistics]]:
        """Collect the statistics that the method needs of each adapter, on its training texts."""
        kind = get_method(method_of(str(setting.options["method"]))).needs_statistic
        return {"statistics": [self._collected(kind)[i] for i in indices]} if kind else {}

    @functools.cache  # noqa: B019  (one bench per process)
    def _collected(self, kind: str) -> list[TaskStatistics]:
        return [
            collect_statistics(
                task.adapter,
                self.base,
                self.training.of(task.name),
                kind=kind,
                labels=task.labels,
                batch_size=classification.BATCH_SIZE,
                max_length=classification.MAX_LENGTH,
            )
            for task in self.tasks
        ]

    def _multiplied(self, merged: Any) -> Deltas:
        """Return the deltas of an (IA)³ adapter, biases included, as PEFT makes them.

        Like other deltas, they are linear in a common weight: W∘(1 + s(l − 1)) is W + s(W∘l − W).
        """
        with tempfile.TemporaryDirectory() as folder:
            merged.save_pretrained(Path(folder) / "merged")
            model = classification.load_with_peft(self.base, Path(folder) / "merged")
        before = dict(self.model.named_parameters())
        after = dict(model.merge_and_unload().base_model.named_parameters())
        prefix = self.model.base_model_prefix
        return {
            f"{prefix}.{name}": (value - before[f"{prefix}.{name}"]).detach()
            for name, value in after.items()
            if not torch.equal(value, before[f"{prefix}.{name}"])
        }

    def _accuracy(self, model: Model, index: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            pooled = classification.encode(model, self.batches[index])
        return self.tasks[index].accuracy(pooled.float())


@contextlib.contextmanager
def added(model: Model, deltas: Deltas, scale: float) -> Generator[None]:
    """Add `scale` times the deltas to the model; restore it bit for bit afterwards."""
    parameters = {name: model.get_parameter(name).data for name in deltas}
    kept = {name: values.clone() for name, values in parameters.items()}
    try:
        for name, delta in deltas.items():
            parameters[name].add_(delta, alpha=scale)
        yield
    finally:
        for name, values in kept.items():
            parameters[name].copy_(values)


def climb(score: Callable[[float], Score], scales: tuple[float, ...]) -> dict[float, Score]:
    """Return the scores at 1 and, in either direction of `scales`, as long as the mean improves."""
    scores = {1.0: score(1.0)}
    above = sorted(scale for scale in scales if scale > 1)
    below = sorted((scale for scale in scales if scale < 1), reverse=True)
    for side in (above, below):
        best = scores[1.0].mean
        for scale in side:
            scores[scale] = score(scale)
            if scores[scale].mean < best:
                break
            best = scores[scale].mean
        if best > scores[1.0].mean:
            break
    return scores


def settings_of(text: str) -> list[Setting]:
    """Return every setting that a line such as ``pcb space=knots|core density=0.1`` stands for."""
    method, *pairs = text.split()
    names = [pair.partition("=")[0] for pair in pairs]
    choices = [pair.partition("=")[2].split("|") for pair in pairs]
    return [
        Setting(
            " ".join(
                [method, *(f"{name}={value}" for name, value in zip(names, picked, strict=True))]
            ),
            {"method": method}
            | {name: _value(value) for name, value in zip(names, picked, strict=True)},
        )
        for picked in itertools.product(*choices)
    ]


def _value(text: str) -> object:
    """Parse a number, a list of them (``1,0.5``) or a calibration; return any other word as it is."""
    if ":" in text and not text.startswith(("budget:", "utility:")):
        return parse_step(text)
    if "," in text:
        return [float(part) for part in text.split(",")]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, measure, print the table."""
    options = _parser().parse_args(arguments)
    examples = demo.examples_folder()
    tasks = classification.load_tasks(
        options.adapters or examples / "lora",
        options.data or Path(__file__).parent / "validation",
        options.split,
        options.limit,
        dict(pair.split("=", 1) for pair in options.rename),
    )
    training = Texts(options.training or Path(__file__).parent / "training", options.training_split)
    bench = Bench(tasks, demo.base_model_folder(), training, bfloat16=options.bfloat16)
    settings = itertools.chain.from_iterable(map(settings_of, options.settings or SETTINGS))
    run = _all_together if options.together is None else _some_together
    sys.stdout.write(run(bench, list(settings), options))
    return 0


def _some_together(bench: Bench, settings: list[Setting], options: argparse.Namespace) -> str:
    results: dict[str, list[Score]] = {}
    for setting in settings:
        results[setting.label] = bench.together(setting, options.together)
        sys.stderr.write(line_of_subsets(setting.label, results[setting.label]) + "\n")
    return table_of_subsets(options.together, results)


def _all_together(bench: Bench, settings: list[Setting], options: argparse.Namespace) -> str:
    base = Result("none: the base encoder", {1.0: bench.score({}, 1.0)}, 0.0)
    results = [base]
    for setting in settings:
        try:
            results.append(bench.measure(setting, options.scales))
        except PcbPeftError as error:
            sys.stderr.write(f"{setting.label}: {error}\n")
            continue
        sys.stderr.write(results[-1].line + "\n")
        if options.output:
            options.output.write_text(table(bench.tasks, bench.own, results), "utf-8")
    return table(bench.tasks, bench.own, results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="*", help="settings to measure; none: a grid around the defaults")
    add("--adapters", type=Path, help="folder of adapters (default: examples/minilm/lora)")
    add("--data", type=Path, help="folder of <task>.jsonl or <task>/<split>.jsonl")
    add("--training", type=Path, help="folder of <task>.jsonl, for methods that need data")
    add(
        "--training-split",
        default="train",
        help="file of a task's folder, for methods that need data (default: %(default)s)",
    )
    add("--together", type=int, metavar="N", help="merge every N of the adapters, at weight 1")
    add("--split", default="validation", help="file of a task's folder (default: %(default)s)")
    add("--limit", type=int, default=250, help="texts per task (default: %(default)s)")
    add(
        "--rename",
        action="append",
        default=[],
        metavar="LABEL=OTHER",
        help="a label of the data that task.json calls otherwise",
    )
    add("--scales", type=_scales, default=SCALES, help="common weights, for example 0.5,1,2")
    add("--bfloat16", action="store_true", help="run the encoder in bfloat16: several times faster")
    add("--output", type=Path, help="also write the table to this file")
    return parser


def _scales(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
