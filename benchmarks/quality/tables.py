"""Tables and plots of what `run.py` has measured.

    python benchmarks/quality/tables.py benchmarks/quality/results/*.jsonl
    python benchmarks/quality/tables.py benchmarks/quality/results/*.jsonl --into docs/methods.md --plots plots

The second line replaces the tables between two marks of a page, those of validation texts between two others, and draws
what is kept against rank and against the number of adapters.
"""

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

MARKS = {
    "test": ("<!-- quality tables: begin -->", "<!-- quality tables: end -->"),
    "validation": ("<!-- validation tables: begin -->", "<!-- validation tables: end -->"),
}
"""Where the tables stand on a page, by the texts that were measured."""
BASE = "no merge: the base model"
RANK, DENSITY = "rank=", "density="


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """Shares that a merge keeps of its tasks, on test texts.

    Attributes:
        tasks: What is kept of each task, by its name.
        errors: The standard errors of these.
    """

    tasks: dict[str, float]
    errors: dict[str, float]

    @classmethod
    def of(cls, measured: dict[str, Any]) -> "Kept":
        """Return what a line of JSON says of each task."""
        tasks = {name: task["kept"] for name, task in measured.items()}
        return cls(tasks, {name: task["error"] for name, task in measured.items()})

    @property
    def mean(self) -> tuple[float, float]:
        """What is kept on average, and its standard error."""
        return fmean(self.tasks.values()), math.hypot(*self.errors.values()) / len(self.errors)

    @property
    def worst(self) -> tuple[float, float]:
        """What is kept of the task of which the least is kept, and its standard error."""
        name = min(self.tasks, key=self.tasks.__getitem__)
        return self.tasks[name], self.errors[name]


@dataclasses.dataclass(frozen=True, slots=True)
class Merge:
    """One merge.

    Attributes:
        pool: Its pool.
        setting: How it was merged.
        names: The adapters.
        split: The texts that were measured: test or validation.
        limit: Texts per task; None: all.
        at_one: What is kept with every weight at 1.
        best: What is kept at the common weight that validation texts chose; None: none was searched.
        scale: That weight.
    """

    pool: str
    setting: str
    names: tuple[str, ...]
    split: str
    limit: int | None
    at_one: Kept
    best: Kept | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Merge":
        """Return the merge of a line of JSON."""
        merge = cls(
            line["pool"],
            line["setting"],
            tuple(line["adapters"]),
            line["split"],
            line["limit"],
            Kept.of(line["at_one"]),
        )
        if not line["validation"]:
            return merge
        return dataclasses.replace(merge, best=Kept.of(line["test"]), scale=line["scale"])

    @classmethod
    def base_of(cls, line: dict[str, Any]) -> "Merge":
        """Return the base model of a line of JSON, as a merge that leaves nothing of the adapters."""
        base = {name: task["base"] for name, task in line["test"].items()}
        kept = Kept(base, dict.fromkeys(base, math.nan))
        return dataclasses.replace(cls.of(line), setting=BASE, at_one=kept, best=None)

    @property
    def count(self) -> int:
        """How many adapters."""
        return len(self.names)


def read(*files: Path) -> list[Merge]:
    """Read the results, with the base model once for each set of adapters; a search replaces the same merge without."""
    lines = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    found: dict[tuple[Any, ...], Merge] = {}
    for line in lines:
        for merge in (Merge.of(line), Merge.base_of(line)):
            key = merge.pool, merge.names, merge.split, merge.limit, merge.setting
            if key not in found or merge.best is not None:
                found[key] = merge
    return [*found.values()]


def tables(merges: Iterable[Merge], split: str = "test") -> str:
    """Return all tables in Markdown, the best setting at weight 1 first.

    Each pool and number of adapters has a table. Settings that were measured on fewer sets of adapters than others have
    one of their own, where all settings are shown on these sets alone.
    """
    groups: dict[tuple[str, int], dict[str, list[Merge]]] = {}
    for merge in merges:
        if merge.split == split:
            settings = groups.setdefault((merge.pool, -merge.count), {})
            settings.setdefault(merge.setting, []).append(merge)
    return "\n".join(
        _table(pool, -count, shown)
        for pool, count in sorted(groups)
        for shown in _on_the_same_sets(groups[pool, count])
    )


def _on_the_same_sets(settings: dict[str, list[Merge]]) -> Iterator[dict[str, list[Merge]]]:
    sets = {name: frozenset(merge.names for merge in given) for name, given in settings.items()}
    different = {names for setting, names in sets.items() if setting != BASE}
    for shown in sorted(different, key=lambda names: (-len(names), sorted(names))):
        yield {
            name: [merge for merge in given if merge.names in shown]
            for name, given in settings.items()
            if sets[name] >= shown
        }


def _table(pool: str, count: int, settings: dict[str, list[Merge]]) -> str:
    ordered = sorted(settings.values(), key=lambda merges: -fmean(m.at_one.mean[0] for m in merges))
    several = len(ordered[0])
    first = ordered[0][0]
    kinds = f"{count} adapters" if count > 1 else "one adapter"
    what = f"{several} merges of {kinds}" if several > 1 else kinds
    names = " ".join(first.names)
    head = ["setting", "mean at 1", "worst at 1", "best weight", "mean", "worst"]
    head += [] if several > 1 else [names]
    lines = [
        f"**{pool}**: {what}, {first.limit or 'all'} {first.split} texts per task, "
        "in % of each adapter's own accuracy.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(_row(merges, by_task=several == 1) for merges in ordered),
    ]
    return "\n".join(lines) + "\n"


def _row(merges: Sequence[Merge], *, by_task: bool) -> str:
    searched = [merge.best for merge in merges if merge.best is not None]
    found = ["", "", ""]
    if len(searched) == len(merges):
        found = [f"{fmean(merge.scale for merge in merges):.2g}", *_numbers(searched)]
    setting = merges[0].setting
    cells = [
        setting if setting == BASE else f"`{setting}`",
        *_numbers([merge.at_one for merge in merges]),
        *found,
        *([_by_task(merges[0])] if by_task else []),
    ]
    return f"| {' | '.join(cells)} |"


def _by_task(merge: Merge) -> str:
    return " ".join(f"{100 * merge.at_one.tasks[name]:.0f}" for name in merge.names)


def _numbers(kept: Sequence[Kept]) -> list[str]:
    """The means over some merges of what is kept on average, and of their worst tasks, with their noise."""
    cells: list[str] = []
    for pairs in ([one.mean for one in kept], [one.worst for one in kept]):
        values, errors = zip(*pairs, strict=True)
        error = math.hypot(*errors) / len(errors)
        noise = "" if math.isnan(error) else f" ± {100 * error:.1f}"
        cells.append(f"{100 * fmean(values):.1f}{noise}")
    return cells


def put_into(page: Path, merges: Sequence[Merge]) -> None:
    """Replace the tables that are between the marks of a page.

    Raises:
        SystemExit: It has no marks.
    """
    content = page.read_text("utf-8")
    for split in {merge.split for merge in merges}:
        first, last = MARKS[split]
        before, begin, rest = content.partition(first)
        _, end, after = rest.partition(last)
        if not begin or not end:
            raise SystemExit(f"{page} has no lines {first} and {last}, between which tables belong")
        content = f"{before}{first}\n\n{tables(merges, split)}\n{last}{after}"
    page.write_text(content, "utf-8")


def draw(merges: Sequence[Merge], folder: Path) -> None:
    """Draw what is kept on average against rank, density and number of adapters; one picture per pool."""
    folder.mkdir(parents=True, exist_ok=True)
    tested = [merge for merge in merges if merge.split == "test"]
    for pool in dict.fromkeys(merge.pool for merge in tested):
        of_pool = [m for m in tested if m.pool == pool and m.setting != BASE]
        everything = max(merge.count for merge in of_pool)
        ours = [m for m in of_pool if m.count == everything and ":" not in m.setting]
        sparse = [merge for merge in ours if DENSITY in merge.setting]
        lossless = [merge for merge in of_pool if RANK not in merge.setting]
        adapters = [merge for merge in ours if f"{RANK}full" not in merge.setting]
        _picture(adapters, _rank, "rank", folder / f"{pool}-rank.png")
        _picture(sparse, lambda m: _named(m, DENSITY), "density", folder / f"{pool}-density.png")
        _picture(lossless, lambda m: m.count, "adapters", folder / f"{pool}-adapters.png")


def _rank(merge: Merge) -> float:
    """The rank that a setting names; lossless is drawn as the largest possible one."""
    return _named(merge, RANK, 16.0 * merge.count)


def _named(merge: Merge, name: str, default: float = 0.0) -> float:
    """The number that a setting has behind a name such as ``rank=``."""
    words = [word for word in merge.setting.split() if word.startswith(name)]
    return float(words[0].removeprefix(name)) if words else default


def _picture(
    merges: Sequence[Merge], place: Callable[[Merge], float], label: str, file: Path
) -> None:
    """Lines of the methods that were measured at two places or more."""

    def method(merge: Merge) -> str:
        return " ".join(w for w in merge.setting.split() if not w.startswith(f"{label}="))

    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    for name, given in itertools.groupby(sorted(merges, key=method), method):
        points: dict[float, list[tuple[float, float]]] = {}
        for merge in given:
            points.setdefault(place(merge), []).append(merge.at_one.mean)
        if len(points) > 1:
            places = sorted(points)
            means = [100 * fmean(mean for mean, _ in points[p]) for p in places]
            noise = [100 * math.hypot(*(e for _, e in points[p])) / len(points[p]) for p in places]
            axes.errorbar(places, means, noise, marker="o", capsize=3, label=name)
    axes.set(xlabel=label, ylabel="kept on average with every weight at 1, %")
    if axes.containers:
        axes.legend()
        figure.savefig(file, dpi=80)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or put them into a page; draw the plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="files of JSON lines that run.py has written")
    add("--into", type=Path, metavar="PAGE", help="put the tables between the marks of a page")
    add("--plots", type=Path, metavar="FOLDER", help="draw plots into this folder")
    parsed = parser.parse_args(arguments)
    merges = read(*parsed.results)
    if parsed.into:
        put_into(parsed.into, merges)
    else:
        print(*(tables(merges, split) for split in MARKS))
    if parsed.plots:
        draw(merges, parsed.plots)


if __name__ == "__main__":
    main()
