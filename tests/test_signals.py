"""A signal ends a run also where the exception that it raises is lost, and what was begun is cleaned up behind it."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, threading, time
from pcb_peft.runtime.signals import raising_on_signals

class Finaliser:
    def __del__(self):  # Python prints the exceptions of a finaliser, and goes on
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            pass

threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
with raising_on_signals(lambda: None):
    try:
        one = Finaliser()
        del one
        print("lost")
        time.sleep(60)
    finally:
        try:
            raise ValueError
        except ValueError:
            time.sleep(1.5)
        print("cleaned up")
"""


@pytest.mark.slow
def test_an_exception_that_was_lost_comes_again_but_not_into_the_cleaning_up():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout.split("\n")) == (143, ["lost", "cleaned up", ""])
