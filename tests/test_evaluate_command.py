import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from pcb_peft import merge_adapters
from pcb_peft.commands import cli
from pcb_peft.commands.demo import base_model_folder, examples_folder

pytestmark = pytest.mark.slow  # whole models: the parts are tested by themselves


LORA, DATA = examples_folder() / "lora", examples_folder() / "data"
Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge that leaves one of two adapters out, and knows its recipe."""
    directory = tmp_path_factory.mktemp("place")
    adapters = [LORA / "clinc_domain", LORA / "subj"]
    merged = merge_adapters(adapters, "linear", weights=[0, 1], base_model=base_model_folder())
    merged.save_pretrained(directory / "merged")
    return directory


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(place)

    def run(line: str) -> tuple[int, str, str]:
        code = cli.main(shlex.split(line.format(data=DATA, lora=LORA)))
        return code, *capsys.readouterr()

    return run


EVALUATE = (
    "evaluate merged --data {data}/clinc_domain.jsonl {data}/subj.jsonl --limit 30 --cache cache"
)


@pytest.mark.slow
def test_the_recipe_says_which_adapters_and_which_base(run: Run):
    code, out, _ = run(EVALUATE)
    assert code == 0
    assert out.splitlines()[1].startswith("clinc_domain")
    assert "LOST: clinc_domain\n" in out


def test_a_pipeline_fails_below_a_limit(run: Run, place: Path):
    code, out, _ = run(f"{EVALUATE} --fail-below 0.8 --log log.jsonl")
    assert code == 3
    assert out.splitlines()[-1] == "below 80%: clinc_domain"
    assert json.loads((place / "log.jsonl").read_text())["lost"] == ["clinc_domain"]
    assert run(f"{EVALUATE} --fail-below 0.1")[0] == 0
    swapped = "--limit 4 --rename objective=subjective subjective=objective --fail-below 0.1"
    code, out, _ = run(f"evaluate merged --data subj={{data}}/subj.jsonl {swapped}")
    assert (code, out.splitlines()[-1]) == (3, "below 10%: subj")
    assert "the adapter alone scores 0" in out
    for share in ("80", "nan"):  # with nan, no task would ever be below
        code, _, err = run(f"{EVALUATE} --threshold 0.8 --fail-below {share}")
        assert code == 64
        assert f"--fail-below is {share}; it must be a share from 0 to 1" in err


def test_the_page_has_the_table(run: Run, place: Path):
    code, out, _ = run(f"{EVALUATE} --report page.html")
    assert code == 0
    assert "report for a browser: page.html" in out
    page = (place / "page.html").read_text("utf-8")
    assert "LOST: keeps" in page
    assert "subj (accuracy)" in page
    (place / "diary.html").write_text("dear diary")
    code, _, err = run(f"{EVALUATE} --report diary.html")
    assert code == 2
    assert "diary.html" in err


def test_json(run: Run):
    code, out, _ = run(f"{EVALUATE} --json --fail-below 0.8")
    found = json.loads(out)
    assert code == 3
    assert found["command"] == "evaluate"
    assert found["below"] == ["clinc_domain"]
    assert {task["task"] for task in found["tasks"]} == {"clinc_domain", "subj"}


def test_files_by_name(run: Run):
    line = "evaluate merged --data subj={data}/subj.jsonl --limit 30 --cache cache --json"
    assert [task["task"] for task in json.loads(run(line)[1])["tasks"]] == ["subj"]
    code, _, err = run("evaluate merged --data subj={data}/subj.jsonl {data}/clinc_domain.jsonl")
    assert code == 64
    assert "some files have a name and some have none" in err
    assert run(f"{EVALUATE} --rename ab")[0] == 64
    code, _, err = run(
        "evaluate merged --data subj={data}/subj.jsonl subj={data}/clinc_domain.jsonl"
    )
    assert code == 64
    assert "--data: 'subj' is given twice" in err
    code, _, err = run("evaluate merge --data {data}/subj.jsonl")
    assert code == 2
    assert "there is no directory merge; did you mean ./merged?" in err


def test_the_error_of_an_unknown_label_shows_the_flag(run: Run, place: Path):
    lines = (DATA / "subj.jsonl").read_text().replace('"subjective"', '"subjectiv"')
    (place / "subj.jsonl").write_text(lines)
    line = "evaluate merged --adapters {lora}/subj --data subj.jsonl --cache cache --limit 30"
    code, _, err = run(line)
    assert code == 2
    assert '--rename "subjectiv=subjective"' in err
    assert run(f'{line} --rename "subjectiv=subjective"')[0] == 0
