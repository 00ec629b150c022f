"""The report beside an output: read back it is the report, it is the same each time, and it names no local path."""

import dataclasses
import json

import pytest
import torch
from helpers import lora

from pcb_peft import AdapterError, export, inspect_adapter, merge_adapters
from pcb_peft.commands import cli
from pcb_peft.merging.report_file import read_report, without_paths

FILE = "merge_report.json"
LORA = lora("q_proj", "down_proj")


def same(read, report):
    """The report, but for its time and digits that are not written."""
    assert dataclasses.replace(read, modules={}, notes=()) == dataclasses.replace(
        report, modules={}, notes=(), seconds=0.0
    )
    assert read.notes == report.notes
    assert read.modules.keys() == report.modules.keys()
    for module, line in report.modules.items():
        found = read.modules[module]
        assert (found.shape, found.rank) == (line.shape, line.rank)
        assert (found.norm, found.energy) == pytest.approx((line.norm, line.energy), rel=1e-5)
        for name, norm in line.adapter_norms.items():
            assert found.adapter_norms[name] == pytest.approx(norm, rel=1e-5)
            assert found.products[name] == pytest.approx(line.products[name], rel=1e-5)


def test_it_is_read_back_and_is_the_same_each_time(workshop, tmp_path):
    paths = workshop.adapters("llama", [LORA, LORA])
    saved = merge_adapters(paths, "ties", density=0.5).save_pretrained(tmp_path / "one")
    same(read_report(tmp_path / "one"), saved.report)
    torch.set_num_threads(2)
    try:
        merge_adapters(paths, "ties", density=0.5).save_pretrained(tmp_path / "two")
    finally:
        torch.set_num_threads(1)
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()


def test_a_directory_with_it_is_known_and_can_be_overwritten(workshop, tmp_path):
    merged = merge_adapters(workshop.adapters("llama", [LORA, LORA]))
    merged.save_pretrained(tmp_path / "out")
    assert FILE in json.loads((tmp_path / "out" / ".pcb_peft.json").read_text())["files"]
    merged.save_pretrained(tmp_path / "out", overwrite=True)


def test_a_fold_has_the_report_that_is_known_at_its_end(workshop, tmp_path):
    paths, base = workshop.adapters("llama", [LORA, LORA]), workshop.base("llama")
    pending = merge_adapters(paths, "ties", rank="full")
    for _ in range(2):  # the list of files knows what was written later
        done = pending.fold(base, tmp_path / "out", overwrite=True)
    read = read_report(tmp_path / "out")
    assert read.pending == 0
    assert set(read.modules) == set(done.modules)
    said = str(inspect_adapter(tmp_path / "out"))
    assert "out: a model with a merge folded into its weights" in said
    assert "made by this merge:\nties in " in said


def test_no_local_path_is_in_it(workshop, tmp_path, monkeypatch):
    """Directories with spaces, relative ones, and those that only an adapter's configuration names."""
    home = tmp_path / "Jane Doe" / "llama"
    home.mkdir(parents=True)
    paths = [
        workshop.adapter("llama", LORA, f"run {seed}/adapter", seed=seed, base=base)
        for seed, base in ((1, str(home)), (2, "/nowhere/at all/llama"), (3, "meta/llama"))
    ]
    monkeypatch.chdir(tmp_path)
    merged = merge_adapters([paths[0], "run 2/adapter", paths[2]])
    assert "/nowhere/at all/llama" in str(merged.report)  # the screen may say it
    merged.save_pretrained("out")
    text = (tmp_path / "out" / FILE).read_text()
    for words in (str(tmp_path), "Jane", "nowhere", "at all", "run "):
        assert words not in text
    assert "meta/llama" in text
    weights = json.loads(text)["weights"]
    assert [one["adapter"] for one in weights] == list(merged.report.adapters)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("see https://arxiv.org/abs/1 and org/model", "see https://arxiv.org/abs/1 and org/model"),
        ("⟨M, ΔW⟩ / ‖ΔW‖² is 3 / 4 of org/a", "⟨M, ΔW⟩ / ‖ΔW‖² is 3 / 4 of org/a"),
        ("saved to heads/, and (../x/y) too", "saved to heads/, and (y) too"),
        (r"C:\Users\Jane Doe\llama, ~/models/opt", "llama, opt"),
        ("'/srv/a b/c': rank 4", "'c': rank 4"),
    ],
)
def test_paths_are_told_from_words(text, wanted):
    assert without_paths(text) == wanted


def test_a_saved_merge_tells_how_it_was_made(workshop, tmp_path, capsys):
    paths = workshop.adapters("llama", [LORA, LORA])
    words = ["merge", *map(str, paths), "-o", str(tmp_path / "out"), "--method", "linear"]
    assert cli.main(words) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "made by this merge:\nlinear in " in said
    assert "adapter2" in said
    assert cli.main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    (data,) = json.loads(capsys.readouterr().out)["adapters"]
    assert data["made"]["method"] == "linear"
    assert cli.main(["inspect", str(paths[0])]) == 0
    assert "made by" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["{", '{"method": 3}', "[]"])
def test_a_damaged_report_is_named(workshop, tmp_path, damage):
    merge_adapters(workshop.adapters("llama", [LORA, LORA])).save_pretrained(tmp_path / "out")
    (tmp_path / "out" / FILE).write_text(damage)
    with pytest.raises(AdapterError, match=FILE):
        inspect_adapter(tmp_path / "out")


def test_an_export_that_cuts_the_rank_says_so(workshop, tmp_path):
    merged = merge_adapters(workshop.adapters("llama", [LORA, LORA]))
    export(merged, "peft", tmp_path / "out", max_rank=1, progress=False)
    assert any(
        "cut to rank 1 after the merge" in note for note in read_report(tmp_path / "out").notes
    )
