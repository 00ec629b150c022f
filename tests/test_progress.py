"""Progress bars: what they show, when they tick, and when there are none."""

import contextlib
import io
import re
import time

import pytest

from pcb_peft.runtime import processes, progress


class Terminal(io.StringIO):
    """A terminal as a text: what was written to it."""

    def isatty(self):
        return True

    @property
    def shown(self):
        """The text without the codes that colour it and move the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", self.getvalue())


@pytest.fixture
def look(monkeypatch):
    """Makes standard error a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return lambda: contextlib.redirect_stderr(Terminal())


def wait_until(seen):
    """Waits for the thread that draws, which may have to wait for a core itself."""
    end = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_still(terminal):
    """Whether nothing is drawn any more."""
    length = len(terminal.getvalue())
    time.sleep(0.3)
    return len(terminal.getvalue()) == length


def test_a_bar_counts_and_goes_when_all_is_done(look):
    with look() as terminal:
        for item in progress.tracker(None)(["a", "b", "c"], "statistics"):
            if item == "b":
                wait_until(lambda: re.search(r"statistics .* 1/3 0:\d\d:\d\d ", terminal.shown))
        assert terminal.getvalue().endswith("\r\x1b[2K\x1b[?25h\r")  # the line is wiped
        assert is_still(terminal)


def test_the_clock_ticks_while_one_item_takes_long(look):
    with look() as terminal:
        for _ in progress.tracker(None)(["long"], "merge"):
            wait_until(lambda: len({*re.findall(r"\d:\d\d:\d\d", terminal.shown)}) > 1)


def test_a_phase_stands_above_the_bars_inside_of_it(look):
    with look() as terminal, progress.phase("merging"):
        for _ in progress.tracker(None)(iter([1, 2]), "statistics"):
            wait_until(lambda: re.search(r"merging .*\n *statistics ", terminal.shown))


def test_what_was_interrupted_leaves_no_bar(look):
    with look() as terminal:
        items = iter(progress.tracker(None)([1, 2], "merge"))
        next(items)
        length = len(terminal.getvalue())
        wait_until(lambda: len(terminal.getvalue()) > length)
        progress.close()
        assert is_still(terminal)
        assert list(items) == [2]


def test_two_bars_share_one_display(look):
    with look() as terminal:
        one, two = (iter(progress.tracker(None)([1, 2], name)) for name in ("first", "second"))
        next(one), next(two)
        wait_until(lambda: re.search(r"first .*\n *second ", terminal.shown))
        assert list(one) == list(two) == [2]
        assert is_still(terminal)


@pytest.mark.parametrize("wanted", [None, False])
def test_there_is_no_bar_where_nobody_looks_or_wants_one(capsys, wanted):
    items = [1, 2]
    assert progress.tracker(wanted)(items, "merge") is items
    with progress.phase("merging", wanted):
        pass
    assert capsys.readouterr() == ("", "")


def test_another_process_shows_nothing(look, monkeypatch):
    monkeypatch.setattr(progress, "current", lambda: processes.Processes(rank=1, size=2))
    with look() as terminal:
        list(progress.tracker(progress=True)([1, 2], "merge"))
    assert terminal.getvalue() == ""
