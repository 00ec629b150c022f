"""The page of a merge: what stands in it, that no name becomes markup, and that a browser shows it."""

import html.parser
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import adapter, lora, low_rank

from pcb_peft import (
    AdapterError,
    Evaluation,
    OutputError,
    UnsupportedError,
    compare_adapters,
    inspect_adapter,
    merge_adapters,
    write_report,
)
from pcb_peft.commands import cli
from pcb_peft.evaluation.card import write_to_card
from pcb_peft.evaluation.scores import Score, TaskScores
from pcb_peft.inspection.pairs import geometry_of
from pcb_peft.reporting.charts import HeatMap
from pcb_peft.reporting.page import spectrum_of
from pcb_peft.runtime.progress import silent

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
VOID = {"meta", "path", "polyline", "circle", "link", "br", "img"}


class Page(html.parser.HTMLParser):
    """Text and tables of a page in which every element that begins ends."""

    def __init__(self, content):
        super().__init__()
        self.open, self.text, self.tags = [], "", []
        self.rows = []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data


def in_memory():
    """Two adapters; names of one of them, and of a module, are markup."""
    modules = [*(f"layers.{i}.q_proj" for i in range(2)), 'layers.2."</td></table><b onload=x>']
    return [
        adapter(name, {m: low_rank(2, seed=seed + i)[0] for i, m in enumerate(modules)})
        for seed, name in ((0, "<script>alert(1)</script>"), (10, "plain & simple"))
    ]


@pytest.fixture
def page(tmp_path):
    adapters = in_memory()
    merged = merge_adapters(adapters, "ties", space="core")
    write_report(merged, tmp_path / "report.html", adapters)
    return merged, adapters, (tmp_path / "report.html").read_text("utf-8")


def test_no_name_becomes_markup_and_nothing_is_fetched(page):
    _, _, content = page
    read = Page(content)
    assert "<script>alert(1)</script>" in read.text
    assert '"</td></table><b onload=x>' in read.text
    assert not {"script", "b"} & {tag for tag, _ in read.tags}
    assert not re.search(r"https?://", content)
    links = [a["href"] for _, a in read.tags if "href" in a]
    assert all(link.startswith("#") and f'id="{link[1:]}"' in content for link in links)
    assert not any("src" in attributes for _, attributes in read.tags)


def test_the_tables_hold_the_numbers_of_the_report(page):
    merged, adapters, content = page
    rows = Page(content).rows
    for number, (name, line) in enumerate(merged.report.adapters.items(), 1):
        row = next(row for row in rows if row[0] == f"{number} {name}")
        assert row[2:4] == [f"{line.norm:.4g}", f"{line.share:.2f}"]
        shares = [f"{share:.2f}" for share in line.by_layer.values()]
        assert ["q_proj", *shares[:2], ""] in rows  # a column for each layer
    cosine = float(geometry_of(adapters, silent).cosines[0, 1])
    assert [f"2 {adapters[1].name}", f"{cosine:.2f}"] in rows


@pytest.mark.parametrize(("times", "row"), [(1, 0), (4, 0), (1, 1)])
def test_three_sentences_say_who_is_strong_what_is_common_and_where_to_look(tmp_path, times, row):
    """Adapter b is the change of a, times a number, or lies in another row; in the merge it counts half."""
    columns, rows = np.eye(16), np.eye(12)
    a, b = (columns[:, :1], rows[:1]), (times * columns[:, [row]], rows[[row]])
    adapters = [adapter("a", {"m": a}), adapter("b", {"m": b})]
    merged = merge_adapters(adapters, "linear", [1, 0.5])
    write_report(merged, tmp_path / "report.html", adapters)
    words = " ".join(Page((tmp_path / "report.html").read_text("utf-8")).text.split())
    strong = "b is the strongest: its norm is 4, 4.0 times that of a."
    assert (strong if times > 1 else "All adapters are about equally strong") in words
    common = "Most in common have a and b, with a cosine of 1.00"
    assert (
        common if row == 0 else "The changes have almost nothing in common; nearest are a"
    ) in words
    look = min("ab", key=lambda name: merged.report.adapters[name].share)
    assert f"Look at {look} first: the merge makes" in words


def test_every_table_and_figure_can_be_reached_and_named(page):
    _, _, content = page
    tags = Page(content).tags
    regions = [attributes for tag, attributes in tags if attributes.get("role") == "region"]
    assert regions
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in regions)
    (picture,) = [attributes for tag, attributes in tags if tag == "svg"]
    assert picture["aria-label"]
    assert ("html", {"lang": "en"}) in tags


def test_the_spectrum_is_that_of_the_merge():
    merged = merge_adapters(in_memory(), "linear")
    spectrum = spectrum_of(merged, silent)
    values = [merged.delta(m).double().svd().S.square() for m in merged.modules]
    total = sum(value[:4] for value in values)
    assert spectrum.energies == pytest.approx((total.cumsum(0) / total.sum()).tolist(), abs=1e-6)
    assert spectrum.ranks["90%"] <= spectrum.ranks["99%"] <= 4


def texts(figure):
    (axes,) = figure.axes
    return [text.get_text() for text in axes.texts]


@pytest.mark.slow
def test_figures_have_the_numbers_of_the_report_and_of_the_comparison():
    pytest.importorskip("matplotlib")
    adapters = in_memory()
    report = merge_adapters(adapters, "ties", space="core").report
    shares = [s for one in report.adapters.values() for s in one.by_layer.values()]
    assert texts(report.plot_shares()) == [f"{share:.2f}" for share in shares]
    conflicts = [line.conflicts for line in report.modules.values()]  # one target per layer
    assert texts(report.plot_conflicts()) == [f"{conflict:.2f}" for conflict in conflicts]
    cosine = f"{float(geometry_of(adapters, silent).cosines[0, 1]):.2f}"
    assert texts(compare_adapters(adapters).plot_cosines()) == ["1.00", cosine, cosine, "1.00"]


@pytest.mark.slow
def test_a_figure_of_a_deep_model_is_small_and_any_name_is_text():
    pytest.importorskip("matplotlib")
    names = ("$x_{", "costs 5$")
    deep = [
        adapter(name, {f"layers.{i}.q_proj": low_rank(1, seed=seed + i)[0] for i in range(80)})
        for seed, name in enumerate(names)
    ]
    figure = merge_adapters(deep, "linear").report.plot_shares()
    axes, scale = figure.axes
    assert not axes.texts
    assert len(axes.get_xticks()) <= 24
    assert figure.get_size_inches()[0] < 20
    figure.savefig(io.BytesIO())
    assert scale.get_ylim()[0] < scale.get_ylim()[1]


def test_figures_without_matplotlib_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"pcb-peft\[plots\]"):
        merge_adapters(in_memory(), "ties").report.plot_shares()


def evaluated():
    """Half of the adapter's answers are lost; a task's name is markup."""
    scores = [Score.of(outcomes, losses=False) for outcomes in ([0] * 8, [1] * 8, [1, 0] * 4)]
    roles = dict(zip(("base", "adapter", "merged"), scores, strict=True))
    lost = TaskScores(name="</table><script>", metric="accuracy", texts=8, **roles)
    own = TaskScores(name="plain", metric="my score", texts=0, base=Score(0.1), merged=Score(3))
    return Evaluation("merged", (lost, own), notes=("few <texts>",))


def test_the_page_of_a_saved_merge_has_the_evaluation_that_was_written_beside_it(
    workshop, tmp_path
):
    """The page, the card and the JSON have the same numbers."""
    paths, out = workshop.adapters("mlp", [lora(), lora()]), tmp_path / "out"
    merge_adapters(paths).save_pretrained(out)
    write_report(out, tmp_path / "before.html")
    assert "Run texts" in Page((tmp_path / "before.html").read_text("utf-8")).text
    write_to_card(evaluated(), out)
    write_report(out, tmp_path / "after.html")
    page = Page((tmp_path / "after.html").read_text("utf-8"))
    row = next(row for row in page.rows if row[0] == "</table><script> (accuracy)")
    assert row[1:5] == ["8", "0.0 %", "100.0 %", "50.0 %"]
    assert row[6:] == ["50.0 %", "LOST: keeps 50%, less than 80%"]
    assert ["plain (my score)", "–", "0.1", "–", "3", "–", "–", "better than the base"] in page.rows
    assert "few <texts>" in page.text
    assert str(tmp_path) not in (tmp_path / "after.html").read_text("utf-8")
    assert "Lost: </table><script>." in page.text
    assert "keeps 50.0 % of its adapters' scores on average" in page.text
    assert "Run texts" not in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    card = (out / "README.md").read_text("utf-8")
    assert "| 50.0 (" in card
    assert json.loads((out / "evaluation.json").read_text())["tasks"][0]["merged"] == 0.5
    (paths[0] / "evaluation.json").write_text("another program's")
    assert inspect_adapter(paths[0]).evaluation is None
    seen = inspect_adapter(out)
    assert seen.as_dict()["evaluation"]["tasks"][0]["kept"] == 0.5
    table = str(seen).split("evaluation")[1].splitlines()
    assert table[0].split() == ["base", "adapter", "merge", "kept", "verdict"]
    assert "0.0 %  100.0 %  50.0 %  50.0%  LOST" in table[1]
    write_report(out, tmp_path / "given.html", evaluation=evaluated())
    assert (tmp_path / "given.html").read_bytes() == (tmp_path / "after.html").read_bytes()


def test_a_folded_model_has_a_page_too(workshop, tmp_path):
    paths = workshop.adapters("llama", [lora("q_proj"), lora("q_proj")])
    merged = merge_adapters(paths, base_model=workshop.base("llama"))
    merged.fold(workshop.base("llama"), tmp_path / "model")
    write_report(tmp_path / "model", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert any(row[0] == "2 adapter2" for row in page.rows)


def test_a_directory_without_a_report_has_no_page(workshop, tmp_path):
    with pytest.raises(AdapterError, match=r"merge_report\.json"):
        write_report(workshop.adapter("mlp", lora()), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_deep_model_is_drawn_without_numbers_which_stand_below(tmp_path):
    deep = [
        adapter(name, {f"layers.{i}.q_proj": low_rank(1, seed=seed + i)[0] for i in range(40)})
        for seed, name in ((0, "x"), (100, "y"))
    ]
    merged = merge_adapters(deep, "linear")
    write_report(merged, tmp_path / "page.html", deep)
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    share = f"{merged.report.adapters['x'].by_layer['39']:.2f}"
    assert f"q_proj, 39: {share}" in page.text
    assert sum(tag == "rect" for tag, _ in page.tags) == 4 * 40  # two shares, signs, strength
    assert next(row for row in page.rows if row[0] == "q_proj")[40] == share


def test_a_heat_map_has_a_shade_for_every_value():
    heat_map = HeatMap.of("t", "w", {("a", "x"): 0.0, ("a", "y"): 1.0, ("b", "x"): 2.0}, (0, 1))
    assert heat_map.columns == ("x", "y")
    shades = [[cell.shade for cell in cells] for _, cells in heat_map.rows]
    assert shades == [[0, 8], [8, 0]]
    assert heat_map.rows[1][1][1].text == ""


def test_a_page_replaces_a_page_and_nothing_else(page, tmp_path):
    merged, adapters, _ = page
    with pytest.raises(OutputError, match="overwrite"):
        write_report(merged, tmp_path / "report.html", adapters)
    write_report(merged, tmp_path / "report.html", adapters, overwrite=True)
    (tmp_path / "diary.html").write_text("dear diary")
    with pytest.raises(OutputError):
        write_report(merged, tmp_path / "diary.html", adapters, overwrite=True)
    assert (tmp_path / "diary.html").read_text() == "dear diary"


def test_merge_writes_a_page(workshop, tmp_path, capsys):
    paths = workshop.adapters("mlp", [lora(), lora()])
    words = ["merge", *map(str, paths), "-o", str(tmp_path / "out")]
    assert cli.main([*words, "--report", str(tmp_path / "page.html")]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    assert "adapter1" in Page((tmp_path / "page.html").read_text("utf-8")).text


def test_a_page_that_cannot_be_written_is_refused_before_the_merge(workshop, tmp_path, capsys):
    paths = workshop.adapters("mlp", [lora(), lora()])
    (tmp_path / "diary.html").write_text("dear diary")
    words = ["merge", *map(str, paths), "-o", str(tmp_path / "out"), "--overwrite"]
    assert cli.main([*words, "--report", str(tmp_path / "diary.html")]) == 2
    assert "diary.html" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.usefixtures("page")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_without_errors(tmp_path, scheme):
    number = 0 if scheme == "dark" else 1
    flags = [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    flags.append(f"--blink-settings=preferredColorScheme={number}")
    command = [CHROMIUM, *flags, "--dump-dom", (tmp_path / "report.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "plain &amp; simple" in shown.stdout
    assert "CONSOLE" not in shown.stderr
