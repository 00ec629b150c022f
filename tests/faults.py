"""Faults while files are read and written: a kill, a signal, a full or a broken disk at each call about files.

``python tests/faults.py`` tries all calls of a merge, a fold and a single file, and prints a table; it takes minutes.
test_faults.py has a sample of it. A layer in C (faults.c) counts the calls, and lets one of them fail; each command
runs in a forked process. A power cut is a model of a disk: see power_cut.py.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import models
import torch
from helpers import content
from power_cut import states
from safetensors.torch import save_file

from pcb_peft.commands import cli
from pcb_peft.writing.manifest import MANIFEST

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
BELOW = "PCB_PEFT_FAULTS"  # set where the layer is below this process
MOST_SECONDS = 60
LORA = '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]}'
KILL, TERM = -signal.SIGKILL, -signal.SIGTERM
NAMES = {KILL: "SIGKILL", TERM: "SIGTERM", errno.EIO: "EIO", errno.ENOSPC: "ENOSPC"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens at a call: an error number, or minus the number of a signal."""

    kind: int
    at: int
    stays: bool = False

    def __str__(self) -> str:
        return f"{NAMES[self.kind]}{' from' * self.stays} at call {self.at}"


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


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that writes an output.

    Attributes:
        name: Name for the table.
        directory: Directory of its inputs, and of ``place``, in which the output is written.
        words: The command, up to ``-o``.
        old: The same for what is there before; None for nothing.
        output: Name of the output.
        no_exchange: As on a file system that cannot exchange two directories.
    """

    name: str
    directory: Path
    words: Sequence[object]
    old: Sequence[object] | None = None
    output: str = "out"
    no_exchange: bool = False

    @property
    def place(self) -> Path:
        return self.directory / "place"

    @property
    def target(self) -> Path:
        return self.place / self.output

    def command(self, words: Sequence[object]) -> list[object]:
        return [*words, "-o", self.target, "--overwrite"]


class Trials:
    """A case, and what must hold after each fault: the old output or the new one, and a rerun that succeeds."""

    def __init__(self, layer: Layer, case: Case) -> None:
        """Make the old output and the new one."""
        self.layer, self.case = layer, case
        self.old: dict[str, bytes] = {}
        case.place.mkdir(exist_ok=True)
        if case.old is not None:
            self._run_here(case.old)
            self.old = content(case.place)
            shutil.copytree(case.place, self._old_place)
        self._run_here(case.words)
        self.new = content(case.place)
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

    def _run_here(self, words: Sequence[object]) -> None:
        """Run the command in this process, so that forked ones find all that it imports."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert cli.main(list(map(str, self.case.command(words)))) == 0

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
        beside = [path for path in self.case.place.iterdir() if path != self.case.target]
        if state == "old" and not beside:
            return state  # all is as before the command, and a rerun is the first run
        assert fault.kind == KILL or fault.stays or not beside, f"{told}left {beside}"
        again = self._run(self.case.words)
        assert again.code == 0, f"{told}the rerun: {again.errors}"
        assert content(self.case.place) == self.new, f"{told}the rerun left something else"
        assert bool(beside) == ("a killed run" in again.errors or "was killed" in again.errors), (
            f"{told}beside it was {beside}; the rerun said: {again.errors}"
        )
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
        for call, files in states(self.case.place, self.old, self.new, calls):
            told = f"{self.case.name}, the power fails after {call}: "
            ends[self._state(files, told)] += 1
            seen.setdefault(repr(sorted(files.items())), files)
        kept = list(seen.values())
        for files in kept[:: max(1, len(kept) // most)]:
            shutil.rmtree(self.case.place)
            write_content(self.case.place, files)
            again = self._run(self.case.words)
            assert again.code == 0, f"{sorted(files)}: the run after a power cut: {again.errors}"
            assert content(self.case.place) == self.new, sorted(files)
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
        found = content(place)
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


def cases(directory: Path) -> Iterator[Case]:
    """Yield commands that write directories and single files, over nothing and over an older output."""
    one, two = (lora(directory / name, seed) for seed, name in enumerate(("one", "two")))
    base = directory / "base"
    models.save(models.original("llama"), base, shard="8KB")
    merge = ["merge", one, two]
    yield Case("merge", directory, merge)
    yield Case("merge over an old one", directory, merge, ["merge", two, one, "--weights", 1, 2])
    yield Case(
        "merge over an old one, without exchange",
        directory,
        merge,
        ["merge", two, one, "--weights", 1, 2],
        no_exchange=True,
    )
    yield Case("fold", directory, ["fold", one, base])
    yield Case("fold over an old one", directory, ["fold", one, base], ["fold", two, base])
    full = ["merge", one, two, "--base-model", base, "--rank", "full", "--fold"]
    yield Case("merge and fold, whole", directory, full)
    export = ["export", one, "--to", "portable"]
    yield Case("export", directory, export)
    yield Case("export over an old one", directory, export, ["export", two, "--to", "portable"])
    gguf = ["export", one, "--to", "gguf", "--base-model", base]
    yield Case("export to GGUF", directory, gguf, output="out.gguf")
    kohya = [kohya_lora(directory / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]
    yield Case("file", directory, ["merge", *kohya], output="out.safetensors")
    yield Case(
        "file over an old one",
        directory,
        ["merge", *kohya],
        ["merge", *kohya, "--weights", 1, 2],
        output="out.safetensors",
    )


def lora(directory: Path, seed: int) -> Path:
    """Make an adapter of the tiny llama, as PEFT writes it."""
    shapes = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 24)}
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for layer in range(2):
        for module, (rows, cols) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, cols, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    directory.mkdir()
    (directory / "adapter_config.json").write_text(LORA)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def kohya_lora(path: Path, seed: int) -> Path:
    """Make a LoRA of an image model."""
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for kind in "qk":
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{kind}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 320, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(320, 2, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


FAULTS = (
    Fault(KILL, 0),
    Fault(TERM, 0),
    Fault(errno.EIO, 0),
    Fault(errno.ENOSPC, 0),
    Fault(errno.ENOSPC, 0, stays=True),
)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def row(case: str, fault: str, ends: collections.Counter[str]) -> str:
    """Return a row of the table."""
    counts = [ends[name] for name in ("old", "new", "set aside", "lost")]
    return f"| {' | '.join(map(str, (case, fault, ends.total(), *counts)))} |"


def sweep(layer: Layer, wanted: Sequence[Case], most: int, directory: Path) -> list[str]:
    """Try faults at the calls of some cases, and print a table; return what went wrong."""
    bad: list[str] = []
    say("| output | fault | tried | old output | new output | set aside, repaired | lost |")
    say("|---|---|---|---|---|---|---|")
    for case in wanted:
        trials = Trials(layer, case)
        for fault in FAULTS:
            ends = collections.Counter[str]()
            calls = trials.calls(fault)
            step = max(1, calls // most)
            for at in range(calls, 0, -step):
                ends[trials.tried(dataclasses.replace(fault, at=at), bad)] += 1
            say(row(case.name, NAMES[fault.kind] + ", stays" * fault.stays, ends))
        try:
            say(row(case.name, "power cut", trials.power_cuts(directory / "log", most)))
        except AssertionError as error:
            bad.append(str(error))
            say(str(error))
        trials.restore()
    return bad


def main() -> int:
    """Try a fault at every call, and print how often the old output was there, and how often the new one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=1 << 30, help="calls to try of each kind")
    parser.add_argument("--case", action="append", help="only the case of this name")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if BELOW not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            return with_layer(Path(folder), sys.argv[1:]).returncode
    torch.set_num_threads(1)
    inputs = parsed.directory / "in"
    inputs.mkdir()
    wanted = [case for case in cases(inputs) if not parsed.case or case.name in parsed.case]
    return 1 if sweep(Layer(parsed.directory), wanted, parsed.most, parsed.directory) else 0


if __name__ == "__main__":
    sys.exit(main())
