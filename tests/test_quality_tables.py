"""benchmarks/quality: settings, subsets, and tables made of results."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "quality"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(SCRIPTS)
    import cohort
    import settings
    import tables

    return SimpleNamespace(cohort=cohort, settings=settings, tables=tables)


def line(setting: str, adapters: dict[str, tuple[float, float]], scale: float = 1.0) -> str:
    """A line of results: what is kept of each task, with its standard error."""
    test = {
        name: {"kept": kept, "error": error, "base": 0.25, "own": 0.8, "texts": 100}
        for name, (kept, error) in adapters.items()
    }
    return json.dumps(
        {
            "pool": "pool",
            "adapters": [*adapters],
            "limit": 100,
            "setting": setting,
            "scale": scale,
            "at_one": dict.fromkeys(adapters, 0.5),
            "test": test,
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
    assert third.distill == 64
    (peer,) = scripts.settings.settings_of(["peft:ties_svd density=0.2"])
    assert (peer.peer, first.peer) == ("ties_svd", None)


def test_subsets_are_evenly_spread(scripts: SimpleNamespace):
    names = tuple("abcdef")
    assert scripts.cohort.subsets(names, None, 3) == [names]
    assert scripts.cohort.subsets(names, 2, 3) == [("a", "b"), ("b", "c"), ("c", "e")]
    assert len(scripts.cohort.subsets(names, 2, 99)) == 15
    assert scripts.cohort.subsets(names, 7, 3) == []


def test_a_table_says_the_noise_and_the_worst_task(scripts: SimpleNamespace, tmp_path: Path):
    file, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    results = [
        line("pcb", {"a": (0.9, 0.03), "b": (0.7, 0.04)}, 1.25),
        line("flat", {"a": (1.0, 0.03), "b": (0.8, 0.04)}),
    ]
    file.write_text("\n".join(results))
    page.write_text(f"before\n{scripts.tables.BEGIN}\nold\n{scripts.tables.END}\nafter\n")
    scripts.tables.main([str(file), "--into", str(page)])
    text = page.read_text()
    assert (text.startswith("before\n"), text.endswith("\nafter\n"), "old" in text) == (1, 1, 0)
    rows = [row for row in text.splitlines() if row.startswith("| ")][1:]
    assert rows == [  # the error of a mean of two: √(3² + 4²)/2
        "| `flat` | 1 | 90.0 ± 2.5 | 80.0 ± 4.0 | 50.0 | 50.0 |",
        "| `pcb` | 1.2 | 80.0 ± 2.5 | 70.0 ± 4.0 | 50.0 | 50.0 |",
        "| no merge: the base model |  | 25.0 | 25.0 | 25.0 | 25.0 |",
    ]


def test_merges_of_subsets_are_a_row_together(scripts: SimpleNamespace, tmp_path: Path):
    file = tmp_path / "results.jsonl"
    pairs = [
        line("pcb", {"a": (0.9, 0.03), "b": (0.7, 0.04)}),
        line("pcb", {"a": (0.8, 0.03), "c": (0.6, 0.04)}),
    ]
    file.write_text("\n".join(pairs))
    text = scripts.tables.tables(scripts.tables.read(file))
    noise = 100 * math.hypot(0.025, 0.025) / 2
    assert f"| `pcb` | 1 | 75.0 ± {noise:.1f} | 65.0 ± 2.8 |" in text
    assert "2 merges" in text
