"""Whatever is registered is explained, has a source and is compared with something outside of the package."""

import re

import definitions
import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from test_every_adapter import CASES

from pcb_peft import list_methods, list_spaces
from pcb_peft.calibrations import list_calibrations
from pcb_peft.formats import list_formats

CALIBRATIONS = {
    f"{when} {name}": calibration
    for when in ("before", "after")
    for name, calibration in list_calibrations(when).items()
}
PUBLISHED = {**list_methods(), **CALIBRATIONS}
EVERYTHING = {**PUBLISHED, **{f"space {name}": space for name, space in list_spaces().items()}}
PAPER = (
    r"arXiv:\d{4}\.\d{4,5}|doi:10\.\d+/\S+|goddard\.blog|none"  # none: new here, and not published
)

# Formats that have a test file of their own instead of a case in test_every_adapter.
ELSEWHERE = {
    "IA3": "test_formats",
    "TRAINABLE_TOKENS": "test_replaced",
    "DIFFUSERS": "test_pipeline",
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_it_says_what_it_does_and_explains_every_option(name):
    found = EVERYTHING[name]
    assert found.summary.endswith(".")
    assert not [option.name for option in found.options.values() if not option.explanation]


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_names_its_source(name):
    """A year, as in "Source: Ilharco et al. 2023", or an address."""
    assert re.search(r"\b(19|20)\d\d\b|\w\.\w+/\w", PUBLISHED[name].paragraph("Source"))
    assert re.fullmatch(PAPER, PUBLISHED[name].paper)
    assert "0000.00000" not in PUBLISHED[name].paper


def test_every_method_has_a_definition_that_it_is_compared_with():
    """A new method needs a function in definitions.py."""
    tables = [definitions.ELEMENTWISE, definitions.SPECTRAL, definitions.WITH_STATISTICS]
    assert {*definitions.BY_FORMULA}.union(*tables) == {*list_methods()}


def test_every_calibration_has_a_definition_that_it_is_compared_with():
    assert definitions.BEFORE.keys() == list_calibrations("before").keys()
    assert {*definitions.AFTER, *definitions.WHOLE_MODEL} == {*list_calibrations("after")}


def test_every_format_has_an_adapter_of_peft_that_it_is_compared_with():
    """A new format needs a case in test_every_adapter.py."""
    tuners = {case.tuner for case in CASES.values()}
    cases = {kind.value for kind, tuner in PEFT_TYPE_TO_CONFIG_MAPPING.items() if tuner in tuners}
    assert {*list_formats()} - ELSEWHERE.keys() <= cases
    assert not cases & {*ELSEWHERE} - {"IA3"}
