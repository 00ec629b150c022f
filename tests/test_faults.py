"""A sample of the faults of faults.py (``python tests/faults.py`` tries all), and systems that lack something."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import faults
import peft
import pytest

from pcb_peft.base.hub import not_found
from pcb_peft.commands import cli
from pcb_peft.errors import NoSpaceError, OptionError, OutputError, ProcessError
from pcb_peft.runtime import processes
from pcb_peft.runtime.paths import cache_directory
from pcb_peft.runtime.processes import joined
from pcb_peft.runtime.scratch import private_directory
from pcb_peft.writing.targets import resolved


@pytest.mark.slow
@pytest.mark.skipif(
    faults.COMPILER is None, reason="needs a C compiler for the layer in which calls fail"
)
def test_after_a_fault_there_is_the_old_output_or_the_new_and_a_rerun_succeeds(tmp_path, capfd):
    names = ("file over an old one", "fold over an old one")
    ended = faults.with_layer(tmp_path, ["--most", "2", *(f"--case={name}" for name in names)])
    said = capfd.readouterr().out
    assert ended.returncode == 0, said
    for name in names:
        assert said.count(f"| {name} |") == len(faults.FAULTS) + 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.EIO, "Input/output error", "weights"), 2, "weights: Input/output error"),
        (OSError(errno.EFBIG, "File too large", "out"), 2, "out: File too large"),
        (OSError(errno.ENOSPC, "No space left", "out"), 4, "out: No space left"),
        (OSError(errno.EBADF, "Bad file descriptor"), 1, "unexpected OSError"),
    ],
)
def test_what_a_disk_refuses_is_no_error_of_this_program(monkeypatch, capsys, error, code, said):
    def broken(_):
        raise error

    monkeypatch.setattr(cli, "_run", broken)
    assert cli.main(["methods"]) == code
    assert said in capsys.readouterr().err


def test_a_current_directory_that_is_gone_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["inspect", "math"]) == 2
    assert "current directory has been removed" in capsys.readouterr().err
    with pytest.raises(OutputError, match="whole path"):
        resolved(Path("out"))
    assert "current directory has been removed" in not_found("math")
    assert resolved(tmp_path / "out") == tmp_path.resolve() / "out"
    monkeypatch.chdir(tmp_path)


def test_without_a_home_the_variables_for_the_cache_are_named(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(OptionError, match="XDG_CACHE_HOME"):
        cache_directory("moments")


def test_without_a_place_for_temporary_files_the_variable_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OutputError, match="TMPDIR"), private_directory():
        pytest.fail("it was made")


def test_a_full_place_for_temporary_files_is_named_with_its_variable(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NoSpaceError, match="TMPDIR"), private_directory() as place:
        raise NoSpaceError(f"{place}/merged cannot be written")
    with pytest.raises(NoSpaceError, match=r"^out cannot be written$"), private_directory():
        raise NoSpaceError("out cannot be written")
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(NoSpaceError, match="TMPDIR"), private_directory():
        pytest.fail("it was made")


def test_a_number_of_processes_without_a_launcher_is_refused(monkeypatch):
    from accelerate import PartialState

    monkeypatch.setattr(os, "environ", os.environ.copy())  # accelerate writes into it
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ["WORLD_SIZE"] = "2"
    try:
        with pytest.raises(ProcessError, match="torchrun"), joined():
            pytest.fail("it joined")
    finally:
        PartialState._reset_state()


def test_a_first_machine_that_nobody_knows_is_said_in_time(monkeypatch):
    monkeypatch.setattr(processes, "ADDRESS_SECONDS", 0.01)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("no-such-machine.invalid", "x" * 300):
        monkeypatch.setenv("MASTER_ADDR", name)
        with pytest.raises(ProcessError, match="no machine of that name"), joined():
            pytest.fail("it joined")


INTERRUPTED_IN_TORCH = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent may ignore it
from pcb_peft.commands import cli
def hook(event, details):
    if event == "import" and details[0].startswith("numpy") and "torch" in sys.modules and not sent:
        sent.append(os.kill(os.getpid(), signal.SIGINT))
sent = []
sys.addaudithook(hook)
sys.exit(cli.main(["merge", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_an_interruption_while_torch_is_imported_is_not_lost(tmp_path, workshop):
    """The C code of torch imports numpy, and takes any exception for a numpy that is not there."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    words = [*workshop.adapters("llama", [config, config]), "-o", tmp_path / "out"]
    command = [sys.executable, "-c", INTERRUPTED_IN_TORCH, *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
