"""Merge the adapters of pools in many ways, and measure each merge with `pcb_peft.evaluate`.

    python benchmarks/quality/run.py -o results.jsonl --limit 250
    python benchmarks/quality/run.py -o results.jsonl --pool six=POOL "pcb space=knots|core rank=32|16" linear
    python benchmarks/quality/run.py -o results.jsonl --pool six=POOL --every-method --weight-one

The first merges the example adapters in all ways of ``settings.py``; the second other adapters in the ways that it
names; the third by every method there is, with every weight at 1. The common weight of each merge is chosen on
validation texts, unless it stays at 1; what is written down is measured on test texts. Each measurement is a line of
JSON; those that the file has already are not made again. `--split validation` measures on validation texts: what is
compared while a method is made may not see the test texts.
"""

import argparse
import dataclasses
import functools
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from authors import merged_by_authors
from bases import MINILM, base_model
from cohort import Cohort, all_but_one, subsets
from labelled import trained_on_labels
from peers import merged_by_peft
from sequential import sequential
from settings import (
    CONTROLS,
    DEFAULT,
    LABELLED,
    SEQUENTIAL,
    Setting,
    every_method,
    settings_of,
)
from texts import Row

from pcb_peft import (
    Adapter,
    MergedAdapter,
    collect_statistics,
    distill_merge,
    evaluate,
    get_method,
    merge,
    merge_adapters,
    search,
)
from pcb_peft.commands.demo import examples_folder
from pcb_peft.errors import PcbPeftError
from pcb_peft.evaluation.controls import random_adapter, uniform_soup
from pcb_peft.evaluation.scores import TaskScores
from pcb_peft.evaluation.settings import Settings
from pcb_peft.evaluation.texts import adapter_labels
from pcb_peft.recipes.peft_aliases import method_of
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.searching.climb import climb
from pcb_peft.searching.trials import Objective
from pcb_peft.searching.validation import Validation, prepare

MEAN = Objective(worst=0.0)
"""What the common weight is chosen by: what is kept on average."""

WEIGHTS, DENSITY = (0.4, 2.5), (0.02, 0.5)
"""What CMA-ES searches: a weight for each adapter, and the density of methods that have one."""

TRAINING = 250  # texts of each task, for methods that need statistics


@dataclasses.dataclass(frozen=True)
class Bench:
    """Some adapters of a cohort, and the texts they are measured on.

    Attributes:
        cohort: All adapters.
        names: Those that are merged.
        running: Arguments of `evaluate`: how texts are run.
        choosing: How many validation texts of each task choose the common weight; None: all.
        split: The texts that are measured.
        tasks: The adapters whose tasks are measured; None: of those that are merged.
        codes: Where other people's code is, as `authors.py` takes it.
    """

    cohort: Cohort
    names: tuple[str, ...]
    running: Mapping[str, Any]
    choosing: int | None
    split: str = "test"
    tasks: tuple[str, ...] | None = None
    codes: Mapping[str, Path] = dataclasses.field(default_factory=dict[str, Path])

    @functools.cached_property
    def validation(self) -> Validation:
        """The validation texts, and what each adapter makes of them alone."""
        adapters = self.cohort.adapters(self.names)
        folders, base = map(str, self.cohort.folders), str(self.cohort.base)
        data = self.cohort.data(self.names, "validation")
        settings = Settings(**{**self.running, "limit": self.choosing})
        recipe = Recipe.parse(adapters=[*folders], base_model=base)
        return prepare(recipe, adapters, data, data, settings)

    def line(self, setting: Setting, *, weight_one: bool) -> dict[str, Any]:
        """Merge, choose the common weight on validation texts unless it stays at 1, and measure on test texts."""
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            merged = self._merged(setting, Path(scratch))
            seconds = time.perf_counter() - begun
            fixed = weight_one or setting.method in (*CONTROLS, LABELLED)
            fixed = fixed or setting.distill or setting.search
            found = {} if fixed else climb(functools.partial(self._kept, merged), MEAN, 1.0, None)
            chosen = max(found, key=lambda scale: MEAN(found[scale]), default=1.0)
            tested = {scale: self._tested(merged.scaled(scale)) for scale in {1.0, chosen}}
        return {
            "scale": chosen,
            "validation": {f"{scale:.4g}": round(MEAN(kept), 4) for scale, kept in found.items()},
            "at_one": tested[1.0],
            "test": tested[chosen],
            "seconds": round(seconds, 2),
        }

    def _kept(self, merged: Adapter, scale: float) -> Mapping[str, float]:
        """What is kept of the validation texts at a common weight."""
        return self.validation.kept(merged.scaled(scale), self.names)

    def _tested(self, merged: Adapter) -> dict[str, dict[str, float]]:
        result = evaluate(
            merged,
            self.cohort.adapters(self.tasks or self.names),
            self.cohort.base,
            self.cohort.data(self.tasks or self.names, self.split),
            **self.running,
        )
        return {task.name: _task(task) for task in result.tasks}

    def _merged(self, setting: Setting, scratch: Path) -> Adapter:
        folders = tuple(folder for folder in self.cohort.folders if folder.name in self.names)
        if setting.other is not None:
            return self._merged_elsewhere(*setting.other, setting.options, scratch)
        if setting.method == LABELLED:
            drawn = dict(zip(folders, self._drawn(**setting.options), strict=True))
            return trained_on_labels(drawn, self.cohort.base, scratch)
        adapters = self.cohort.adapters(self.names)
        if setting.method == "average":
            return uniform_soup(adapters, str(self.cohort.base))
        if setting.method == "random":
            return random_adapter(merge_adapters(adapters, "linear", progress=False))
        if setting.method == SEQUENTIAL:
            return self._sequential(adapters, **setting.options)
        merged = merge_adapters(
            adapters,
            setting.method,
            base_model=self.cohort.base,
            progress=False,
            **self._statistics(setting.method, adapters),
            **setting.options,
        )
        if setting.search is not None:
            return self._searched(merged, setting, setting.search)
        if setting.distill is None:
            return merged
        drawn = self._drawn(setting.distill, setting.seed)
        options = {"limit": setting.distill, "seed": setting.seed, "progress": False}
        return distill_merge(merged, adapters, drawn, self.cohort.base, **options)

    def _merged_elsewhere(
        self, code: str, method: str, options: dict[str, Any], scratch: Path
    ) -> Adapter:
        """Merge with PEFT itself, or with other people's code."""
        base = self.cohort.base
        if code == "peft":
            folders = tuple(folder for folder in self.cohort.folders if folder.name in self.names)
            return merged_by_peft(method, folders, base, scratch, **options)
        if code not in self.codes:
            raise SystemExit(f"{code}: its code is not known; see authors.py")
        adapters = self.cohort.adapters(self.names)
        return merged_by_authors(code, self.codes[code], method, adapters, base, scratch, **options)

    def _searched(self, merged: MergedAdapter, setting: Setting, trials: int) -> Adapter:
        """Merge with the weights, and the density, that CMA-ES finds on validation texts."""
        vary: dict[str, Any] = {"weights": WEIGHTS}
        if "density" in get_method(method_of(setting.method)).options:
            vary["density"] = DENSITY
        data = self.cohort.data(self.names, "validation")
        settings = {**self.running, "limit": self.choosing}
        how: dict[str, Any] = {"optimiser": "cma", "trials": trials, "seed": setting.seed}
        found = search(merged.recipe, data, test_data=data, vary=vary, **how, **settings)
        sys.stderr.write(found.recipe.to_yaml())
        return merge(found.recipe, self.cohort.adapters(self.names), progress=False)

    def _sequential(self, adapters: list[Adapter], texts: int, rank: int | None = None) -> Adapter:
        base, drawn = self.cohort.base, self._drawn(texts)
        start = merge_adapters(
            adapters, "flat", metric="random", rank=rank, base_model=base, progress=False
        )
        by_name = dict(zip(self.names, drawn, strict=True))
        return sequential(start, adapters, base, by_name, rank)

    def _drawn(self, texts: int, seed: int = 0) -> list[list[Row]]:
        """Draw so many validation texts of each task."""
        rows = self.cohort.data(self.names, "validation").values()
        return [random.Random(seed).sample(of_task, texts) for of_task in rows]

    def _statistics(self, method: str, adapters: list[Adapter]) -> dict[str, Any]:
        """What a method needs to know of each task, from training texts."""
        kind = get_method(method_of(method)).needs_statistic
        if kind is None:
            return {}
        texts = self.cohort.data(self.names, "train")
        options = {"kind": kind, "limit": TRAINING}
        given = [
            collect_statistics(
                a, self.cohort.base, texts[a.name], labels=adapter_labels(a) or None, **options
            )
            for a in adapters
        ]
        return {"statistics": given}


def _task(task: TaskScores) -> dict[str, float]:
    """What is kept of a task, with its standard error, and the scores it is made of."""
    assert task.adapter is not None  # noqa: S101  (each task has its adapter)
    kept = task.kept or 0.0
    pairs = zip(task.merged.outcomes, task.adapter.outcomes, strict=True)
    differences = [merged - kept * own for merged, own in pairs]
    spread = stdev(differences) / math.sqrt(len(differences))
    found = {
        "kept": kept,
        "error": spread / task.adapter.value,
        "base": task.base.value / task.adapter.value,
        "own": task.adapter.value,
        "texts": task.texts,
    }
    return {name: round(value, 4) for name, value in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not in the file yet."""
    parsed = _parser().parse_args(arguments)
    running = {
        "limit": parsed.limit,
        "dtype": torch.bfloat16 if parsed.bfloat16 else torch.float32,
        "batch_size": 64,
        "progress": False,
    }
    given = parsed.settings or (every_method() if parsed.every_method else DEFAULT)
    settings = settings_of(given)
    codes = {name: Path(place).absolute() for name, _, place in _named(parsed.code)}
    done = _done(parsed.output)
    for cohort in _cohorts(parsed):
        for names, tasks in _merges(parsed, cohort.names):
            facts = {
                "pool": cohort.name if tasks is None else f"{cohort.name}, unseen tasks",
                "adapters": list(names),
                "split": parsed.split,
                "limit": parsed.limit,
                "weight_one": parsed.weight_one,
            }
            todo = [one for one in settings if _key({**facts, "setting": one.label}) not in done]
            bench = Bench(cohort, names, running, parsed.choosing, parsed.split, tasks, codes)
            for setting in todo:
                _append(parsed, bench, setting, facts)


def _merges(
    parsed: argparse.Namespace, names: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...] | None]]:
    """The adapters of each merge, and the tasks that it is measured on if they are others."""
    if parsed.unseen:
        yield from all_but_one(names)
        return
    for count in (None, *parsed.together):
        yield from ((some, None) for some in subsets(names, count, parsed.subsets))


def _append(
    parsed: argparse.Namespace, bench: Bench, setting: Setting, facts: dict[str, Any]
) -> None:
    try:
        found = bench.line(setting, weight_one=parsed.weight_one)
    except (PcbPeftError, ValueError) as error:  # PEFT merges no (IA)³ by ties
        sys.stderr.write(f"{facts['pool']}, {setting.label}: {error}\n")
        return
    line = {**facts, "setting": setting.label, **found}
    with parsed.output.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    kept = [task["kept"] for task in line["test"].values()]
    mean, worst = 100 * sum(kept) / len(kept), 100 * min(kept)
    title = f"{facts['pool']}, {len(kept)} adapters, {setting.label}"
    sys.stderr.write(f"{title}: {mean:.1f} / {worst:.1f} at {line['scale']:g}\n")


def _done(file: Path) -> set[str]:
    """The measurements in a file; one with a search is also one without."""
    if not file.is_file():
        return set()
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return {_key(one) for line in lines for one in (line, {**line, "weight_one": True})}


def _key(line: Mapping[str, Any]) -> str:
    names = ("pool", "adapters", "split", "limit", "setting", "weight_one")
    return json.dumps([line[name] for name in names])


def _cohorts(parsed: argparse.Namespace) -> list[Cohort]:
    path = Path(parsed.base)
    base = path if path.is_dir() else base_model(parsed.base, parsed.models)
    if not parsed.pool:
        given = {kind: examples_folder() / kind for kind in ("lora", "ia3")}
    else:
        given = {name: Path(path) for name, _, path in _named(parsed.pool)}
    return [Cohort.of(name, directory, base) for name, directory in given.items()]


def _named(words: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Words of the form NAME=PATH."""
    return (word.partition("=") for word in words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="*", help="settings to measure (default: those of settings.py)")
    add("-o", "--output", type=Path, required=True, help="a file of JSON lines")
    add(
        "--pool",
        action="append",
        metavar="NAME=FOLDER",
        help="adapters to merge (default: those of examples/minilm)",
    )
    add(
        "--code",
        action="append",
        default=[],
        metavar="NAME=PLACE",
        help="where other people's code is: knots or core and a clone, mergekit and its program (see authors.py)",
    )
    add("--base", default=MINILM, help="minilm, mpnet, smollm2, or a directory (default: minilm)")
    add("--models", type=Path, default=Path("pools/bases"), help="where base models are kept")
    add("--every-method", action="store_true", help="measure every method as it is by default")
    add("--weight-one", action="store_true", help="leave every weight at 1")
    add(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="texts that are measured (default: test)",
    )
    add("--limit", type=int, help="texts per task (default: all)")
    add(
        "--choosing",
        type=int,
        help="validation texts per task that choose the weight (default: all)",
    )
    add(
        "--together",
        type=int,
        nargs="*",
        default=(),
        metavar="N",
        help="also merge every N of the adapters",
    )
    add("--subsets", type=int, default=15, help="at most so many sets of N (default: 15)")
    add(
        "--unseen",
        action="store_true",
        help="merge all adapters but one, and measure the task of that one; for each",
    )
    add("--bfloat16", action="store_true", help="run the model in bfloat16")
    return parser


if __name__ == "__main__":
    main()
