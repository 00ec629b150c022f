"""The list of methods."""

import re

import pytest

from pcb_peft import list_methods
from pcb_peft.commands.catalog import render
from pcb_peft.methods.default import DEFAULT_METHODS


@pytest.mark.parametrize("name", list_methods())
def test_every_method_says_what_for(name: str):
    assert list_methods()[name].good_at


def test_the_list_begins_with_the_default_and_what_kept_most_comes_first():
    lines = render().splitlines()
    names = [line.split()[0] for line in lines if re.search(r"\d\d\.\d \(\d\d\.\d\)", line)]
    assert names[0] == f"{DEFAULT_METHODS[0]}*"
