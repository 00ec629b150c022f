"""benchmarks/quality: settings, subsets, and tables made of results."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from pcb_peft import get_method, list_methods

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "quality"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(SCRIPTS)
    import cohort
    import settings
    import tables

    return SimpleNamespace(cohort=cohort, settings=settings, tables=tables)


def line(
    setting: str,
    adapters: dict[str, tuple[float, float]],
    best: dict[str, tuple[float, float]] | None = None,
    scale: float = 1.0,
    split: str = "test",
) -> str:
    """A line of results: what is kept of each task, with its standard error; at weight 1, and at the best one."""

    def measured(kept: dict[str, tuple[float, float]]) -> dict[str, object]:
        common = {"base": 0.25, "own": 0.8, "texts": 100}
        worst_first = sorted(kept.items(), key=lambda task: task[1])
        return {name: {"kept": k, "error": error, **common} for name, (k, error) in worst_first}

    return json.dumps(
        {
            "pool": "pool",
            "adapters": [*adapters],
            "split": split,
            "limit": 100,
            "setting": setting,
            "scale": scale,
            "validation": {"1": 0.8} if best else {},
            "at_one": measured(adapters),
            "test": measured(best or adapters),
        }
    )


def test_every_combination_of_alternatives_is_a_setting(scripts: SimpleNamespace):
    given = ["pcb space=knots|core rank=16", "linear after=response:least=0.7 distill=64"]
    first, second, third = scripts.settings.settings_of(given)
    assert (first.label, first.options) == (
        "pcb space=knots rank=16",
        {"space": "knots", "rank": 16},
    )
    assert second.options["space"] == "core"
    assert third.options == {"after": {"response": {"least": 0.7}}}
    assert (third.distill, third.seed) == (64, 0)
    (seeded,) = scripts.settings.settings_of(["flat rank=16 distill=64 seed=2"])
    assert (seeded.options, seeded.distill, seeded.seed) == ({"rank": 16}, 64, 2)
    (labelled,) = scripts.settings.settings_of(["labelled texts=64"])
    assert (labelled.method, labelled.options) == (scripts.settings.LABELLED, {"texts": 64})
    (peer,) = scripts.settings.settings_of(["peft:ties_svd density=0.2"])
    assert (peer.other, first.other) == (("peft", "ties_svd"), None)
    (searched,) = scripts.settings.settings_of(["pcb search=60 seed=1"])
    assert (searched.options, searched.search, searched.seed) == ({}, 60, 1)


def test_subsets_are_evenly_spread(scripts: SimpleNamespace):
    names = tuple("abcdef")
    assert scripts.cohort.subsets(names, None, 3) == [names]
    assert scripts.cohort.subsets(names, 2, 3) == [("a", "b"), ("b", "c"), ("c", "e")]
    assert len(scripts.cohort.subsets(names, 2, 99)) == 15
    assert scripts.cohort.subsets(names, 7, 3) == []
    assert scripts.cohort.all_but_one(("a", "b")) == [(("b",), ("a",)), (("a",), ("b",))]


def test_a_table_says_the_noise_and_the_worst_task(scripts: SimpleNamespace, tmp_path: Path):
    file, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    weak, strong = {"a": (0.9, 0.03), "b": (0.7, 0.04)}, {"a": (1.0, 0.03), "b": (0.8, 0.04)}
    results = [line("pcb", weak), line("flat", strong), line("pcb", weak, strong, 1.25)]
    file.write_text("\n".join(results))
    begin, end = scripts.tables.MARKS["test"]
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    scripts.tables.main([str(file), "--into", str(page)])
    text = page.read_text()
    assert (text.startswith("before\n"), text.endswith("\nafter\n"), "old" in text) == (1, 1, 0)
    rows = [row for row in text.splitlines() if row.startswith("| ")][1:]
    assert rows == [  # the error of a mean of two: √(3² + 4²)/2
        "| `flat` | 90.0 ± 2.5 | 80.0 ± 4.0 |  |  |  | 100 80 |",
        "| `pcb` | 80.0 ± 2.5 | 70.0 ± 4.0 | 1.2 | 90.0 ± 2.5 | 80.0 ± 4.0 | 90 70 |",
        "| no merge: the base model | 25.0 | 25.0 |  |  |  | 25 25 |",
    ]


def test_merges_of_subsets_are_a_row_together(scripts: SimpleNamespace, tmp_path: Path):
    file = tmp_path / "results.jsonl"
    pairs = [
        line("pcb", {"a": (0.9, 0.03), "b": (0.7, 0.04)}),
        line("pcb", {"a": (0.8, 0.03), "c": (0.6, 0.04)}),
        line("flat", {"a": (1.0, 0.03), "b": (0.9, 0.04)}),
        line("linear", {"a": (0.5, 0.03), "b": (0.3, 0.04)}, split="validation"),
    ]
    file.write_text("\n".join(pairs))
    tables = scripts.tables.tables(scripts.tables.read(file))
    both, same = tables.split("**pool**: 2 adapters")
    noise = 100 * math.hypot(0.025, 0.025) / 2
    assert f"| `pcb` | 75.0 ± {noise:.1f} | 65.0 ± 2.8 |  |  |  |" in both
    assert "2 merges of 2 adapters, 100 test texts" in both
    assert "flat" not in both  # it has one of the two merges
    assert "| `flat` | 95.0 ± 2.5 | 90.0 ± 4.0 |  |  |  | 100 90 |" in same
    assert "| `pcb` | 80.0 ± 2.5 | 70.0 ± 4.0 |  |  |  | 90 70 |" in same
    assert "linear" not in tables  # validation texts have tables of their own


def test_the_tables_of_the_documents_are_those_of_the_results(scripts: SimpleNamespace):
    page = (SCRIPTS.parents[1] / "docs" / "methods.md").read_text("utf-8")
    files = sorted((SCRIPTS / "results").glob("*.jsonl"))
    assert files
    merges = scripts.tables.read(*files)
    for split, (begin, end) in scripts.tables.MARKS.items():
        _, _, rest = page.partition(begin)
        shown, _, _ = rest.partition(end)
        assert shown.strip() == scripts.tables.tables(merges, split).strip()


def test_plots_are_drawn_of_all_results(scripts: SimpleNamespace, tmp_path: Path):
    pytest.importorskip("matplotlib")
    scripts.tables.draw(
        scripts.tables.read(*sorted((SCRIPTS / "results").glob("*.jsonl"))), tmp_path
    )
    images = SCRIPTS.parents[1] / "docs" / "images"
    for name in ("minilm-rank", "minilm-density", "minilm8-adapters"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000, name
        assert (images / f"{name}.png").is_file()


def test_what_methods_say_was_measured_is_what_the_results_say(scripts: SimpleNamespace):
    found: dict[tuple[str, str], object] = {}
    merges = scripts.tables.read(*sorted((SCRIPTS / "results").glob("*.jsonl")))
    for merge in sorted(merges, key=lambda merge: merge.count):  # the largest sets are said
        if merge.split == "test":
            found[merge.pool, merge.setting] = merge.at_one
    for name in list_methods():
        rows = [
            f"{kind} {100 * kept.mean[0]:.1f} ({100 * kept.worst[0]:.1f})"
            for kind, pool in (("LoRA", "minilm"), ("(IA)³", "minilm-ia3"))
            if (kept := found.get((pool, name)))
        ]
        assert get_method(name).measured == ("; ".join(rows) + "." if rows else ""), name
