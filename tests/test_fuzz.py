"""A short run of the fuzzer over every surface, and what it must notice.

`python -m tests.fuzz` runs longer; docs/reliability.md tells what has been run.
"""

import contextlib
import os
import time
from random import Random

import pytest
from fuzz import cases, examples, runner
from fuzz.surfaces import SURFACES
from fuzz.texts import TEXTS

from pcb_peft.commands import cli
from pcb_peft.errors import OptionError, PcbPeftError

pytestmark = pytest.mark.filterwarnings("ignore")
SEED = 7
FEW = {"bases": 8, "adapters": 40, "command lines": 25, "statistics": 15}  # cases; of others 60


@pytest.fixture(scope="module", autouse=True)
def _examples():
    yield
    examples.close()


def without_findings(name, directory, count):
    attempt = SURFACES[name](directory)
    found = [one for n in range(count) for one in cases.run(name, attempt, SEED, n)[1]]
    assert not [one for one in found if "seconds" not in one.kind]  # machines differ


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TEXTS))
def test_texts_that_are_damaged_are_read_or_refused(name, tmp_path):
    without_findings(name, tmp_path, 150)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SURFACES.keys() - TEXTS.keys()))
def test_what_strangers_give_is_used_or_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "print_unexpected", cli.print_unexpected)  # the surface sets another
    without_findings(name, tmp_path, FEW.get(name, 60))


def test_a_case_is_known_by_its_number(tmp_path):
    attempt = SURFACES["tensor files"](tmp_path)

    def steps_of(number):
        steps = []
        with contextlib.suppress(PcbPeftError):
            attempt(Random(f"tensor files 0 {number}"), steps)
        return steps

    assert steps_of(5) == steps_of(5) != steps_of(6)


def misbehaving(how):
    def attempt(_, steps):
        steps.append("a step")
        how()

    return attempt


def spin():
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass


class LongError(PcbPeftError):
    __str__ = Exception.__str__  # not cut


def long_message():
    raise LongError("x" * 10_000)


FAULTS = {
    "KeyError at": lambda: {}["x"],
    "more than two seconds": spin,
    "too much memory": lambda: bytes(8 << 20).upper(),
    "a message of more than": long_message,
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_noticed(kind, monkeypatch):
    monkeypatch.setattr(cases, "SECONDS", 0.05 if "seconds" in kind else 60)
    peaks = iter((0.0, 1000.0))
    if "memory" in kind:
        monkeypatch.setattr(cases, "_peak", lambda: next(peaks))
    _, found = cases.run("x", misbehaving(FAULTS[kind]), 0, 3)
    assert [(one.kind.startswith(kind), one.number, one.steps) for one in found] == [
        (True, 3, ("a step",))
    ]


def test_what_is_refused_is_no_finding():
    def refuse():
        raise OptionError("no")

    assert cases.run("x", misbehaving(refuse), 0, 0) == (False, [])
    assert cases.run("x", misbehaving(lambda: None), 0, 0) == (True, [])


@pytest.mark.slow
def test_a_case_that_hangs_or_ends_the_process_is_told_and_the_run_goes_on(monkeypatch):
    monkeypatch.setattr(runner, "HANG", 1.0)

    def attempt(rng, _):
        number = rng.number
        if number == 1:
            os._exit(3)
        if number == 3:
            time.sleep(60)

    class Numbered(Random):
        def __init__(self, text):
            super().__init__(text)
            self.number = int(text.rpartition(" ")[2])

    monkeypatch.setattr(cases, "Random", Numbered)
    result = runner.run_surface("x", attempt, seed=0, seconds=60, most=5)
    assert (result["cases"], result["taken"]) == (5, 3)
    assert {kind: numbers[1] for kind, numbers in result["findings"].items()} == {
        "the process died": 1,
        "a hang": 3,
    }
