"""Tables and plots of what `run.py` has measured.

    python benchmarks/quality/tables.py results.jsonl
    python benchmarks/quality/tables.py results.jsonl --into docs/benchmarks.md --plots plots

The second line replaces the tables between two marks of a page, and draws what is kept against rank and against the
number of adapters.
"""

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

BEGIN, END = "<!-- quality tables: begin -->", "<!-- quality tables: end -->"
BASE = "no merge: the base model"
RANK = "rank="


@dataclasses.dataclass(frozen=True, slots=True)
class Merge:
    """One merge, measured on test texts.

    Attributes:
        pool: Its pool.
        setting: How it was merged.
        count: How many adapters.
        kept: What is kept of each task, by its name.
        errors: The standard errors of these.
        at_one: What is kept with every weight at 1.
        scale: The common weight that validation texts chose.
        limit: Texts per task; None: all.
    """

    pool: str
    setting: str
    count: int
    kept: dict[str, float]
    errors: dict[str, float]
    at_one: dict[str, float]
    scale: float
    limit: int | None

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Merge":
        """Return the merge of a line of JSON."""
        return cls(
            pool=line["pool"],
            setting=line["setting"],
            count=len(line["adapters"]),
            kept={name: task["kept"] for name, task in line["test"].items()},
            errors={name: task["error"] for name, task in line["test"].items()},
            at_one=line["at_one"],
            scale=line["scale"],
            limit=line["limit"],
        )

    @classmethod
    def base_of(cls, line: dict[str, Any]) -> "Merge":
        """Return the base model of a line of JSON, as a merge that leaves nothing of the adapters."""
        base = {name: task["base"] for name, task in line["test"].items()}
        nothing = dict.fromkeys(base, math.nan)
        return dataclasses.replace(
            cls.of(line), setting=BASE, kept=base, errors=nothing, at_one=base, scale=math.nan
        )

    @property
    def mean(self) -> float:
        """What is kept on average."""
        return fmean(self.kept.values())

    @property
    def error(self) -> float:
        """The standard error of the mean over the tasks."""
        return math.hypot(*self.errors.values()) / len(self.errors)

    @property
    def worst(self) -> str:
        """The task of which the least is kept."""
        return min(self.kept, key=self.kept.__getitem__)


def read(file: Path) -> list[Merge]:
    """Read the results, with the base model once for each set of adapters."""
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    bases = {(line["pool"], *line["adapters"]): Merge.base_of(line) for line in lines}
    return [*map(Merge.of, lines), *bases.values()]


def tables(merges: Iterable[Merge]) -> str:
    """Return all tables in Markdown: one for each pool and number of adapters, the best setting first."""
    groups: dict[tuple[str, int], dict[str, list[Merge]]] = {}
    for merge in merges:
        settings = groups.setdefault((merge.pool, -merge.count), {})
        settings.setdefault(merge.setting, []).append(merge)
    return "\n".join(_table(pool, -count, groups[pool, count]) for pool, count in sorted(groups))


def _table(pool: str, count: int, settings: dict[str, list[Merge]]) -> str:
    ordered = sorted(settings.values(), key=lambda merges: -fmean(m.mean for m in merges))
    several = max(map(len, ordered))
    texts = next(iter(settings.values()))[0].limit or "all"
    title = f"**{pool}, {count} adapters**: {several} merges" if several > 1 else f"**{pool}**"
    names = ", ".join(ordered[0][0].kept) if several == 1 else "each on its own tasks"
    head = ["setting", "weight", "mean", "worst", "mean at 1", "worst at 1"]
    lines = [
        f"{title} ({names}; {texts} test texts per task)",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(_row(merges) for merges in ordered),
    ]
    return "\n".join(lines) + "\n"


def _row(merges: Sequence[Merge]) -> str:
    scales = [merge.scale for merge in merges]
    plain = [fmean(m.at_one.values()) for m in merges], [min(m.at_one.values()) for m in merges]
    worst = [merge.kept[merge.worst] for merge in merges]
    error = math.hypot(*(merge.error for merge in merges)) / len(merges)
    of_worst = math.hypot(*(merge.errors[merge.worst] for merge in merges)) / len(merges)
    cells = [
        f"`{merges[0].setting}`" if merges[0].setting != BASE else BASE,
        "" if math.isnan(scales[0]) else f"{fmean(scales):.2g}",
        _percent(fmean(merge.mean for merge in merges), error),
        _percent(fmean(worst), of_worst),
        *(_percent(fmean(values)) for values in plain),
    ]
    return f"| {' | '.join(cells)} |"


def _percent(value: float, error: float = math.nan) -> str:
    noise = "" if math.isnan(error) else f" ± {100 * error:.1f}"
    return f"{100 * value:.1f}{noise}"


def put_into(page: Path, text: str) -> None:
    """Replace what is between the marks of a page.

    Raises:
        SystemExit: It has no marks.
    """
    before, begin, rest = page.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no lines {BEGIN} and {END}, between which tables belong")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", "utf-8")


def draw(merges: Sequence[Merge], folder: Path) -> None:
    """Draw what is kept on average against the rank, and against the number of adapters; one picture per pool."""
    folder.mkdir(parents=True, exist_ok=True)
    for pool in dict.fromkeys(merge.pool for merge in merges):
        of_pool = [merge for merge in merges if merge.pool == pool and merge.setting != BASE]
        everything = max(merge.count for merge in of_pool)
        by_rank = [m for m in of_pool if m.count == everything and not m.setting.startswith("peft")]
        _picture(by_rank, _rank, "rank", folder / f"{pool}-rank.png")
        lossless = [merge for merge in of_pool if RANK not in merge.setting]
        _picture(lossless, lambda m: m.count, "adapters", folder / f"{pool}-adapters.png")


def _rank(merge: Merge) -> float:
    """The rank that a setting names; lossless is drawn as the largest possible one."""
    words = [word for word in merge.setting.split() if word.startswith(RANK)]
    return float(words[0].removeprefix(RANK)) if words else 16.0 * merge.count


def _method(merge: Merge) -> str:
    return " ".join(word for word in merge.setting.split() if not word.startswith(RANK))


def _picture(merges: Sequence[Merge], place: Any, label: str, file: Path) -> None:
    """Lines of the methods that were measured at two places or more."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    for method, given in itertools.groupby(sorted(merges, key=_method), _method):
        points: dict[float, list[float]] = {}
        for merge in given:
            points.setdefault(place(merge), []).append(100 * merge.mean)
        if len(points) > 1:
            places = sorted(points)
            axes.plot(places, [fmean(points[p]) for p in places], marker="o", label=method)
    axes.set(xlabel=label, ylabel="kept on average, %")
    if axes.lines:
        axes.legend()
        figure.savefig(file)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or put them into a page; draw the plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, help="a file of JSON lines that run.py has written")
    add("--into", type=Path, metavar="PAGE", help="put the tables between the marks of a page")
    add("--plots", type=Path, metavar="FOLDER", help="draw plots into this folder")
    parsed = parser.parse_args(arguments)
    merges = read(parsed.results)
    if parsed.into:
        put_into(parsed.into, tables(merges))
    else:
        print(tables(merges))
    if parsed.plots:
        draw(merges, parsed.plots)


if __name__ == "__main__":
    main()
