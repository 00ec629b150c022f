"""What the shelf says of its methods: the numbers are those of the documents."""

import re
from pathlib import Path

import pytest

from pcb_peft import list_methods
from pcb_peft.commands.catalog import render
from pcb_peft.methods.default import DEFAULT_METHODS

DOCUMENT = (
    (Path(__file__).parents[1] / "docs" / "methods.md")
    .read_text("utf-8")
    .partition("## What four tasks keep")[2]
)
NUMBERS = r"(?P<weight>at \S+ |in `dense` space )?(?P<mean>\d+\.\d) \((?P<worst>\d+\.\d)\)"


def tables():
    """Pool to the lines of its tables."""
    lora, _, ia3 = DOCUMENT.partition("The (IA)³ adapters of the same tasks")
    return {"LoRA": lora.splitlines(), "(IA)³": ia3.splitlines()}


def rows(name, pool):
    """The cells of every line about a method as it is, or in dense space."""
    return {
        line.split("`")[1]: line.split("|")[2:7]
        for line in tables()[pool]
        if re.match(rf"\| `{name}( space=\w+)?` ", line)
    }


@pytest.mark.parametrize("name", [name for name, m in list_methods().items() if m.measured])
def test_what_was_measured_is_what_the_document_says(name):
    method = list_methods()[name]
    claims = method.measured.removesuffix(".").split("; ")
    for claim in claims:
        pool, _, numbers = claim.partition(" ")
        found = rows(name, pool)
        plain = found.get(name) or found[f"{name} space={method.space}"]
        for part in numbers.split(", "):
            stated = re.fullmatch(NUMBERS, part)
            mean, worst, weight, best, best_worst = (cell.strip() for cell in plain)
            if stated["weight"] is None:
                wanted = (mean, worst)
            elif stated["weight"].startswith("at "):
                assert stated["weight"].split()[1] == weight
                wanted = (best, best_worst)
            else:
                wanted = tuple(cell.strip() for cell in found[f"{name} space=dense"][:2])
            assert (stated["mean"], stated["worst"]) == wanted


@pytest.mark.parametrize("name", list_methods())
def test_what_is_in_the_document_is_on_the_shelf_and_every_method_says_what_for(name):
    method = list_methods()[name]
    assert method.good_at
    if rows(name, "LoRA"):
        assert method.measured.startswith("LoRA ")


def test_the_list_begins_with_the_default_and_what_kept_most_comes_first():
    lines = render().splitlines()
    names = [line.split()[0] for line in lines if re.search(r"\d\d\.\d \(\d\d\.\d\)", line)]
    assert names[0] == f"{DEFAULT_METHODS[0]}*"
