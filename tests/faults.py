"""Faults while files are read and written: a kill, a signal, a full or a broken disk at each call about files.

``python tests/faults.py`` tries all calls of a merge, a fold and a single file, and prints a table; it takes minutes.
test_faults.py has a sample of it. A layer in C (faults.c) counts the calls, and lets one of them fail; each command
runs in a forked process. A power cut is a model of a disk: see power_cut.py.
"""

import argparse
import collections
import ctypes
import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from fault_cases import Case, cases, run_here
from helpers import content
from power_cut import states

from pcb_peft.commands import cli
from pcb_peft.writing.manifest import MANIFEST

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
BELOW = "PCB_PEFT_FAULTS"  # set where the layer is below this process
MOST_SECONDS = 60
KILL, TERM = -signal.SIGKILL, -signal.SIGTERM
NAMES = {KILL: "SIGKILL", TERM: "SIGTERM", errno.EIO: "EIO", errno.ENOSPC: "ENOSPC"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens at a call: an error number, or minus the number of a signal."""

    kind: int
    at: int
    stays: bool = False

    @property
    def name(self) -> str:
        return NAMES[self.kind] + ", stays" * self.stays

    def __str__(self) -> str:
        return f"{self.name} at call {self.at}"


@dataclasses.dataclass(frozen=True)
class Ended:
    code: int | None
    errors: str


class Layer:
    """The layer in C, which must be there when this process starts: see `with_layer`."""

    def __init__(self, directory: Path) -> None:
        """Take a directory for what the processes say."""
        self._said, self._count = directory / "said", directory / "count"
        self._library = ctypes.CDLL(None)

    def run(
        self,
        words: Sequence[object],
        watched: Path,
        fault: Fault | None = None,
        *,
        no_exchange: bool = False,
        log: Path | None = None,
    ) -> Ended:
        """Run ``pcb-peft *words`` in a process of its own, with a fault at a call about a directory's files."""
        if (pid := os.fork()) == 0:
            said = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            self._watch(watched, fault, no_exchange=no_exchange, log=log)
            code = cli.main(list(map(str, words)))
            calls = self._library.watched_calls()
            self._watch(Path("/nowhere"), None)
            self._count.write_text(str(calls))
            sys.stdout.flush()
            os._exit(code)
        end = time.monotonic() + MOST_SECONDS
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            time.sleep(0.005)
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return Ended(None, f"it was still running after {MOST_SECONDS} seconds")
        return Ended(os.waitstatus_to_exitcode(ended[1]), self._said.read_text())

    def _watch(
        self,
        watched: Path,
        fault: Fault | None,
        *,
        no_exchange: bool = False,
        log: Path | None = None,
    ) -> None:
        kind, at, stays = (fault.kind, fault.at, fault.stays) if fault else (0, 0, False)
        log_to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if log else -1
        self._library.watch_files(
            os.fsencode(watched), int(kind), ctypes.c_long(at), int(stays), int(no_exchange), log_to
        )

    def calls(self, words: Sequence[object], watched: Path, fault: Fault, **options: bool) -> int:
        """Return how many of its calls can meet a fault of this kind."""
        assert self.run(words, watched, Fault(fault.kind, 0), **options).code == 0
        return int(self._count.read_text())


def with_layer(directory: Path, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run this file with the layer below it, and with these words."""
    assert COMPILER
    library, here = directory / "faults.so", Path(__file__)
    subprocess.run(
        [COMPILER, "-O1", "-shared", "-fPIC", "-o", library, here.with_name("faults.c"), "-ldl"],
        check=True,
    )
    environment = os.environ | {"LD_PRELOAD": str(library), BELOW: "yes", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, here, "--directory", directory, *words]
    return subprocess.run(command, env=environment, check=False)


class Trials:
    """A case, and what must hold after each fault: the old output or the new one, and a rerun that succeeds."""

    def __init__(self, layer: Layer, case: Case) -> None:
        """Make the old output and the new one."""
        self.layer, self.case = layer, case
        self.old: dict[str, bytes] = {}
        case.place.mkdir()
        if case.old is not None:
            run_here(case.command(case.old))
            self.old = self._content()
            shutil.copytree(case.place, self._old_place)
        run_here(case.command(case.words))
        self.new = self._content()
        assert self.new != self.old
        self.restore()

    @property
    def _old_place(self) -> Path:
        return self.case.directory / f"old {self.case.name}"

    def calls(self, fault: Fault) -> int:
        """Return how many calls of the case can meet a fault of this kind."""
        self.restore()
        words = self.case.command(self.case.words)
        options = {"no_exchange": self.case.no_exchange}
        return self.layer.calls(words, self.case.directory, fault, **options)

    def _content(self) -> dict[str, bytes]:
        """Return the files that are there, but for what a run leaves for the next one."""
        files = content(self.case.place)
        return {name: text for name, text in files.items() if not self._stays(Path(name))}

    def _stays(self, path: Path) -> bool:
        return path.parts[0] in self.case.stays

    def _run(self, words: Sequence[object], fault: Fault | None = None) -> Ended:
        options = {"no_exchange": self.case.no_exchange}
        return self.layer.run(self.case.command(words), self.case.directory, fault, **options)

    def restore(self) -> None:
        """Put back what was there before the command."""
        shutil.rmtree(self.case.place)
        if self.case.old is None:
            self.case.place.mkdir()
        else:
            shutil.copytree(self._old_place, self.case.place)

    def check(self, fault: Fault) -> str:
        """Run the command with a fault, and again without; return how it ended.

        Raises:
            AssertionError: The output is neither the old nor the new one, or the rerun fails or leaves something.
        """
        self.restore()
        ended = self._run(self.case.words, fault)
        told = f"{self.case.name}, {fault}, status {ended.code}: {ended.errors}"
        state = self._check_state(fault, ended, told)
        names = {path.name for path in self.case.place.iterdir()}
        beside = names - {self.case.output, *self.case.stays}
        if state == "old" and not beside and not self.case.stays:
            return state  # all is as before the command, and a rerun is the first run
        assert fault.kind == KILL or fault.stays or not beside, f"{told}left {beside}"
        again = self._run(self.case.words)
        assert again.code == 0, f"{told}the rerun: {again.errors}"
        now = self._content()
        differ = sorted({n for n in now.keys() | self.new.keys() if now.get(n) != self.new.get(n)})
        assert not differ, f"{told}the rerun left something else: {differ}"
        said = "a killed run" in again.errors or "was killed" in again.errors
        assert said >= bool(beside), f"{told}beside it was {beside}; the rerun said: {again.errors}"
        assert self.case.stays or not said or beside, f"{told}nothing was left, but {again.errors}"
        return state

    def tried(self, fault: Fault, bad: list[str]) -> str:
        """Do what `check` does; a failure goes into a list, and is "lost"."""
        try:
            return self.check(fault)
        except AssertionError as error:
            bad.append(str(error))
            say(str(error).strip())
            return "lost"

    def power_cuts(self, log: Path, most: int) -> collections.Counter[str]:
        """Run the command, and look at what the disk may hold if the power fails after any of its calls.

        Raises:
            AssertionError: The output is neither the old nor the new one, or a run after the power cut fails.
        """
        self.restore()
        words, no_exchange = self.case.command(self.case.words), self.case.no_exchange
        ended = self.layer.run(words, self.case.directory, log=log, no_exchange=no_exchange)
        assert ended.code == 0, ended.errors
        calls = log.read_text().splitlines()
        ends, seen = collections.Counter[str](), dict[str, dict[str, bytes | None]]()
        after = content(self.case.place)
        for call, files in states(self.case.place, self.old, after, calls):
            told = f"{self.case.name}, the power fails after {call}: "
            ends[self._state(files, told)] += 1
            seen.setdefault(repr(sorted(files.items())), files)
        kept = list(seen.values())
        for files in kept[:: max(1, len(kept) // most)]:
            shutil.rmtree(self.case.place)
            write_content(self.case.place, files)
            again = self._run(self.case.words)
            assert again.code == 0, f"{sorted(files)}: the run after a power cut: {again.errors}"
            assert self._content() == self.new, sorted(files)
        return ends

    def _state(self, files: Mapping[str, bytes | None], told: str) -> str:
        """Return which output is among the files: path to content, None for a folder."""
        output = self.case.output
        found = {n: t for n, t in files.items() if Path(n).parts[0] == output and t is not None}
        if found == self.new:
            return "new"
        if found == self.old and (output in files or any(found)) == bool(self.old):
            return "old"
        assert self.case.no_exchange, f"{told}neither the old output nor the new: {sorted(found)}"
        assert output not in files, told
        return "set aside"

    def _check_state(self, fault: Fault, ended: Ended, told: str) -> str:
        allowed = {
            KILL: {KILL},
            TERM: {143},
            errno.EIO: {0, 2},
            errno.ENOSPC: {0, 4},
        }
        assert ended.code in allowed[fault.kind], told
        place = self.case.place
        found = self._content()
        if ended.code == 0:  # the report may say that a base model was not asked for names
            assert without_report(found) == without_report(self.new), f"{told}another output"
            return "new"
        folders = {path.name: None for path in place.iterdir() if path.is_dir()}
        return self._state(folders | found, told)


def without_report(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return files without the report of a merge, and without the list of the files."""
    names = ("merge_report.json", MANIFEST)
    return {name: text for name, text in files.items() if not name.endswith(names)}


def write_content(directory: Path, files: Mapping[str, bytes | None]) -> None:
    """Write files by their paths in a directory; None is a folder."""
    directory.mkdir()
    for name, text in files.items():
        path = directory / name
        (path if text is None else path.parent).mkdir(parents=True, exist_ok=True)
        if text is not None:
            path.write_bytes(text)


FAULTS = (
    Fault(KILL, 0),
    Fault(TERM, 0),
    Fault(errno.EIO, 0),
    Fault(errno.ENOSPC, 0),
    Fault(errno.ENOSPC, 0, stays=True),
)
POWER_CUT = "power cut"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def row(case: str, fault: str, ends: collections.Counter[str]) -> str:
    """Return a row of the table."""
    counts = [ends[name] for name in ("old", "new", "set aside", "lost")]
    return f"| {' | '.join(map(str, (case, fault, ends.total(), *counts)))} |"


def sweep(trials: Trials, kinds: Sequence[str], most: int, log: Path) -> list[str]:
    """Try some kinds of faults at the calls of a case, and print rows of the table; return what went wrong."""
    bad: list[str] = []
    name = trials.case.name
    for fault in [one for one in FAULTS if one.name in kinds]:
        ends = collections.Counter[str]()
        calls = trials.calls(fault)
        for at in range(calls, 0, -max(1, calls // most)):
            ends[trials.tried(dataclasses.replace(fault, at=at), bad)] += 1
        say(row(name, fault.name, ends))
    if POWER_CUT in kinds:
        try:
            say(row(name, POWER_CUT, trials.power_cuts(log, most)))
        except AssertionError as error:
            bad.append(str(error))
            say(str(error))
    shutil.rmtree(trials.case.place)
    return bad


def chosen(all_cases: Iterable[Case], names: Sequence[str] | None) -> Iterator[Case]:
    """Yield the cases of these names, or all; no case after the last one of them is made."""
    missing = set(names or ())
    for case in all_cases:
        if names is None or case.name in missing:
            yield case
            missing.discard(case.name)
            if names and not missing:
                return
    assert not missing, f"there is no case of the name {missing}"


def main() -> int:
    """Try a fault at every call, and print how often the old output was there, and how often the new one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=1 << 30, help="calls to try of each kind")
    parser.add_argument("--case", action="append", help="only the case of this name")
    kinds = [*(one.name for one in FAULTS), POWER_CUT]
    parser.add_argument("--fault", action="append", choices=kinds, help="only faults of this kind")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if BELOW not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            return with_layer(Path(folder), sys.argv[1:]).returncode
    torch.set_num_threads(1)
    inputs = parsed.directory / "in"
    inputs.mkdir()
    layer, bad = Layer(parsed.directory), list[str]()
    say("| output | fault | tried | old output | new output | set aside, repaired | lost |")
    say("|---|---|---|---|---|---|---|")
    for case in chosen(cases(inputs), parsed.case):
        trials = Trials(layer, case)
        bad += sweep(trials, parsed.fault or kinds, parsed.most, parsed.directory / "log")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
