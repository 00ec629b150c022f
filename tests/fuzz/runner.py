"""The runner: cases of one surface after the other, in a process that may hang or die without ending the run."""

import argparse
import contextlib
import json
import mmap
import multiprocessing
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz import cases, examples, folders
from fuzz.cases import Attempt, Finding
from fuzz.surfaces import SURFACES

HANG = 30.0  # seconds after which a case is ended
ROOM = 3 << 30  # bytes of address space that a case may take
LARGEST_FILE = 1 << 28  # bytes of a file that a case may write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer; the exit status is 1 if anything was found."""
    parsed = _parser().parse_args(arguments)
    names = parsed.surface or sorted(SURFACES)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    total: list[dict[str, Any]] = []
    try:
        for name in names:
            if parsed.atheris:
                return _guided(name, parsed.seconds, parsed.seed)
            with _scratch() as directory:
                attempt = SURFACES[name](directory)
                if parsed.case is not None:
                    return _one(name, attempt, parsed.seed, parsed.case)
                budget = parsed.seconds / len(names)
                total.append(
                    run_surface(name, attempt, parsed.seed, budget, parsed.cases, parsed.start)
                )
            _print_result(total[-1])
            if parsed.json:
                with parsed.json.open("a") as file:
                    file.write(json.dumps(total[-1]) + "\n")
    finally:
        examples.close()
    return int(any(result["findings"] for result in total))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--surface", nargs="+", choices=sorted(SURFACES), help="default: all of them"
    )
    parser.add_argument("--seconds", type=float, default=120, help="for all of them together")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="at most, for each of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one alone, with its traceback")
    parser.add_argument("--json", type=Path, help="file to which a line per surface is added")
    parser.add_argument(
        "--atheris",
        action="store_true",
        help="let atheris guide it by coverage: of the surfaces of texts",
    )
    return parser


@contextlib.contextmanager
def _scratch() -> Any:
    directory = folders.scratch()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _one(name: str, attempt: Attempt, seed: int, number: int) -> int:
    """Run one case, with everything that it says."""
    steps: list[str] = []
    try:
        print("result:", attempt(cases.Random(f"{name} {seed} {number}"), steps))
    finally:
        print("steps:", *steps, sep="\n  ")
    return 0


def run_surface(
    name: str, attempt: Attempt, seed: int, seconds: float, most: int, start: int = 0
) -> dict[str, Any]:
    """Run cases of a surface until the time is over; a process that hangs or dies is a finding, and replaced."""
    state = mmap.mmap(
        -1, 32
    )  # of the worker: the case that it is at, and how many inputs were taken
    found: dict[str, list[Finding]] = {}
    began, number = time.monotonic(), start
    while number - start < most and (remaining := seconds - (time.monotonic() - began)) > 0:
        stop = (time.monotonic() + remaining, start + most)
        ours, theirs = multiprocessing.Pipe(duplex=False)
        worker = multiprocessing.get_context("fork").Process(
            target=_work, args=(name, attempt, seed, number, stop, state, theirs)
        )
        worker.start()
        theirs.close()
        for one in _watched(worker, ours, state):
            found.setdefault(one.kind, []).append(one)
        number = _number(state) + 1
    return {
        "surface": name,
        "seed": seed,
        "start": start,
        "cases": number - start,
        "taken": int.from_bytes(state[8:16], "little"),
        "seconds": round(time.monotonic() - began),
        "findings": {
            kind: [len(some), some[0].number, some[0].message, *some[0].steps]
            for kind, some in sorted(found.items(), key=lambda item: -len(item[1]))
        },
    }


def _work(
    name: str,
    attempt: Attempt,
    seed: int,
    number: int,
    stop: tuple[float, int],
    state: mmap.mmap,
    pipe: Connection,
) -> None:
    """Run cases, in a process of its own, and send what is found."""
    warnings.simplefilter("ignore")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    while time.monotonic() < stop[0] and number < stop[1]:
        state[0:8] = number.to_bytes(8, "little")
        taken, found = cases.run(name, attempt, seed, number)
        if taken:
            state[8:16] = (int.from_bytes(state[8:16], "little") + 1).to_bytes(8, "little")
        for one in found:
            pipe.send(one)
        number += 1
    pipe.close()
    os._exit(0)


def _watched(worker: Any, pipe: Connection, state: mmap.mmap) -> list[Finding]:
    """What a worker finds until it ends; it is ended if one case takes too long."""
    found: list[Finding] = []
    number, since = _number(state), time.monotonic()
    while True:
        try:
            while pipe.poll(0.5):
                found.append(pipe.recv())
                if _number(state) != number:
                    number, since = _number(state), time.monotonic()
        except EOFError:
            break
        if _number(state) != number:
            number, since = _number(state), time.monotonic()
        elif time.monotonic() - since > HANG:
            worker.kill()
            found.append(Finding("a hang", number, f"more than {HANG:.0f} s", ()))
            break
    worker.join()
    if worker.exitcode and not (found and found[-1].kind == "a hang"):
        found.append(Finding("the process died", _number(state), f"status {worker.exitcode}", ()))
    return found


def _number(state: mmap.mmap) -> int:
    return int.from_bytes(state[0:8], "little")


def _print_result(result: dict[str, Any]) -> None:
    rate = result["cases"] / max(1, result["seconds"])
    print(
        f"{result['surface']}: {result['cases']:,} cases in {result['seconds']} s ({rate:.0f}/s), "
        f"{result['taken']:,} taken, {len(result['findings'])} kinds of findings",
        flush=True,
    )
    for kind, (count, number, message, *steps) in result["findings"].items():
        print(f"  {count} × {kind}: {message[:300]}")
        print(f"      --surface {result['surface']} --seed {result['seed']} --case {number}")
        for step in steps:
            print(f"      {step[:150]}", flush=True)


def _guided(name: str, seconds: float, seed: int) -> int:
    """Let atheris choose the texts, by the code that they reach; it ends the process."""
    from fuzz import guided

    return guided.run(name, seconds, seed)
