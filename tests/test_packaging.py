"""What is installed, what is shipped, and what the demo says where its data is not."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pcb_peft import OptionError, __version__
from pcb_peft.commands import demo

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
HOME = "https://github.com/pcb-peft/pcb_peft"
LISTED = re.compile(r'"([^"]+)"')
ALWAYS = {"LICENSE", "README.md", "pyproject.toml"}  # hatchling adds them


def listed(start):
    """The strings of the list that begins with a line."""
    _, _, rest = PROJECT.partition(f"\n{start}")
    assert rest, start
    return LISTED.findall(rest.partition("\n]")[0])


def test_every_dependency_has_a_lower_bound():
    dependencies = listed("dependencies = [")
    assert len(dependencies) > 5
    assert all(re.fullmatch(r"[\w-]+>=\d+(\.\d+){2}", dependency) for dependency in dependencies)


def test_the_tests_of_the_lower_bounds_exist():
    script = (ROOT / ".ci" / "lower-bounds").read_text("utf-8")
    names = ",".join(re.findall(r"tests/test_\{([\w,]+)\}\.py", script)).split(",")
    assert len(names) > 5
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in names)


@pytest.mark.skipif(
    not (shutil.which("git") and (ROOT / ".git").exists()),
    reason="needs a checkout to compare with",
)
def test_the_source_distribution_has_all_that_is_in_the_repository():
    command = ["git", "ls-tree", "--name-only", "HEAD"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    _, _, sdist = PROJECT.partition("[tool.hatch.build.targets.sdist]")
    assert {*LISTED.findall(sdist.partition("\n]")[0]), *ALWAYS} == set(tracked.split())


def test_the_wheel_has_the_package_alone():
    _, _, wheel = PROJECT.partition("[tool.hatch.build.targets.wheel]")
    assert wheel.partition("\n\n")[0].strip() == 'only-include = ["pcb_peft"]'


def test_the_demo_finds_its_adapters_in_the_checkout():
    assert demo.examples_folder() == ROOT / "examples" / "minilm"


def test_the_demo_finds_them_in_the_current_directory_or_says_where_they_are(monkeypatch, tmp_path):
    installed = tmp_path / "site-packages" / "pcb_peft" / "commands" / "demo.py"
    monkeypatch.setattr(demo, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=f"git clone {HOME} "):
        demo.examples_folder()
    (tmp_path / "examples" / "minilm").mkdir(parents=True)
    assert demo.examples_folder().resolve() == tmp_path / "examples" / "minilm"


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    (paper,) = citation["references"]
    assert paper["title"] == "Parameter Competition Balancing for Model Merging"
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
