"""Runs one command in several processes, as torchrun would start them.

Importing the package takes seconds. So a server imports it once and forks the processes, which then run and end as any
Python process does. ``fresh=True`` starts new interpreters instead, with a hash seed of their own each.

This file is also the server: ``python launching.py`` reads requests and answers with exit codes, as lines of JSON.
"""

import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
MOST_SECONDS = 300  # for a hang: a busy machine may be ten times slower than an idle one


class Ended(NamedTuple):
    """What became of the processes, by rank: exit codes (negative: the signal), output and errors."""

    codes: list[int]
    outputs: list[str]
    errors: list[str]


class Launcher:
    """Starts processes; what it calls the server is started when the first one is forked."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *_: object) -> None:
        if self._server:
            self._server.communicate()  # its input ends, and so does it

    def __call__(
        self,
        count: int,
        command: Sequence[object],
        *,
        threads: int = 1,
        timeout: float = MOST_SECONDS,
        fresh: bool = False,
        **variables: str,
    ) -> Ended:
        """Runs ``python *command`` in `count` processes until all have ended, or the time is over, which is an error.

        `variables` are added to the environment.
        """
        with tempfile.TemporaryDirectory() as directory:
            request = {
                "command": list(map(str, command)),
                "environments": [e | variables for e in environments(count, threads)],
                "directory": directory,
                "threads": threads,
                "timeout": timeout,
            }
            codes = start_fresh(request) if fresh else self._forked(request)
            outputs, errors = (
                [Path(directory, f"{rank}.{name}").read_text() for rank in range(count)]
                for name in ("out", "err")
            )
        return Ended(codes, outputs, errors)

    def _forked(self, request: Mapping[str, Any]) -> list[int]:
        if self._server is None:
            command = [sys.executable, __file__]
            self._server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._server.stdin
        assert self._server.stdout
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())


def environments(count: int, threads: int) -> list[dict[str, str]]:
    """By rank, what torchrun tells a process through its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def wait(
    poll: Sequence[Callable[[], int | None]], kill: Callable[[int], None], timeout: float
) -> list[int]:
    """Exit codes, once every process has one; those that have none in time are killed."""
    codes: list[int | None] = [None] * len(poll)
    end = time.monotonic() + timeout
    while None in codes:
        codes = [asked() if code is None else code for code, asked in zip(codes, poll, strict=True)]
        if time.monotonic() > end:
            for index, code in enumerate(codes):
                if code is None:
                    kill(index)
        time.sleep(0.01)
    return [code for code in codes if code is not None]


def start_fresh(request: Mapping[str, Any]) -> list[int]:
    """Exit codes of new interpreters."""
    runs = []
    for rank, environment in enumerate(request["environments"]):
        with output(request, rank, "out") as out, output(request, rank, "err") as err:
            command = [sys.executable, *request["command"]]
            runs.append(
                subprocess.Popen(
                    command, env=environment, stdout=out, stderr=err, preexec_fn=hear_signals
                )
            )
    return wait([run.poll for run in runs], lambda index: runs[index].kill(), request["timeout"])


def output(request: Mapping[str, Any], rank: int, name: str) -> Any:
    return Path(request["directory"], f"{rank}.{name}").open("w")


def hear_signals() -> None:
    """Undoes what a parent ignores: as the shell does, it passes that on to all that it starts."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


# --- the server


def serve() -> tuple[Mapping[str, Any], int] | None:
    """Forks what is asked for, until the input ends; in a forked process, the request and its rank."""
    for line in sys.stdin:
        request = json.loads(line)
        pids: list[int] = []
        for rank in range(len(request["environments"])):
            if (pid := os.fork()) == 0:
                return request, rank
            pids.append(pid)
        asked = [functools.partial(exit_code, pid) for pid in pids]
        codes = wait(
            asked, lambda i, pids=pids: os.kill(pids[i], signal.SIGKILL), request["timeout"]
        )
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()
    return None


def exit_code(pid: int) -> int | None:
    """The exit code of a forked process; None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def become(request: Mapping[str, Any], rank: int) -> None:
    """Takes on the environment, the streams and the signals of a process of its own."""
    import torch

    hear_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environments"][rank])
    torch.set_num_threads(request["threads"])
    with (
        Path(os.devnull).open() as null,
        output(request, rank, "out") as out,
        output(request, rank, "err") as err,
    ):
        for stream, number in ((null, 0), (out, 1), (err, 2)):
            os.dup2(stream.fileno(), number)


def run(command: Sequence[str]) -> None:
    """Runs what stands behind ``python`` on a command line."""
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), types.ModuleType("__main__").__dict__)
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    # What merges and folds import. Not PEFT: with it an interrupted Python ends with 1, and not by the signal.
    import accelerate  # noqa: F401
    import torch.distributed  # noqa: F401
    from transformers import LlamaForCausalLM, conversion_mapping, pytorch_utils  # noqa: F401

    import pcb_peft.commands.cli
    import pcb_peft.data.collect
    import pcb_peft.merging.engine  # noqa: F401

    gc.freeze()  # else every process that ends looks through all that was imported
    if (job := serve()) is not None:
        become(*job)
        run(job[0]["command"])
