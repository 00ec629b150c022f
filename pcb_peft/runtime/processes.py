"""Many processes that make one merge: who does what, what they tell each other, and how they stop together.

Processes are started by ``accelerate launch`` or ``torchrun`` and join in `all_processes`. Outside of it, and where
there is but one, every process is alone, and all of this is trivial. What processes tell each other goes over the CPU.

A process is in one of these states::

    WORKING ──all come──▶ MEETING ──all have come──▶ WORKING
       │                     │
       │                     ├──one reports a failure──▶ FAILED   all know, and all leave with its error
       │                     └──signal──▶ STUCK   like GONE; and the connections cannot be closed any more
       └──signal, exception that is no Exception, or lost connection──▶ GONE   it leaves without a word

FAILED, GONE and STUCK are final. The others notice a process that is GONE or STUCK when they next meet: the connection
is lost then.
"""

import atexit
import contextlib
import datetime
import enum
import itertools
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pcb_peft.errors import PcbPeftError, ProcessError
from pcb_peft.runtime.shown import quoted, shown
from pcb_peft.runtime.signals import dying_on_signals, end_process, raising_on_signals

Item = TypeVar("Item")
Key = TypeVar("Key")
Result = TypeVar("Result")

PATIENCE = datetime.timedelta(days=7)  # for others that still work; a dead one is noticed at once
ADDRESS_SECONDS = 10.0
"""Time in which the name of the first machine must become known: on clusters it may be new."""
LONGEST_PAUSE = 0.05  # seconds between two looks at whether all have come


class State(enum.Enum):
    """State of a process: see the top of this file."""

    WORKING = enum.auto()
    MEETING = enum.auto()
    FAILED = enum.auto()
    GONE = enum.auto()
    STUCK = enum.auto()


class Processes:
    """The processes of one merge, as one of them sees them. The methods are named as in MPI.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        """Describe a group of processes.

        Args:
            rank: Number of this process, from 0.
            size: Number of processes.
            group: torch's process group; None for a process that is alone.
        """
        self.rank, self.size = rank, size
        self._group = group
        self._state = State.WORKING

    @property
    def _dist(self) -> Any:
        """torch.distributed, imported when processes talk: one that is alone may not need torch at all."""
        import torch.distributed

        return torch.distributed

    @property
    def is_main(self) -> bool:
        """True in the process that writes and prints."""
        return self.rank == 0

    def partition(self, items: Sequence[Item], cost: Callable[[Item], float]) -> list[Item]:
        """Return this process's share of the items, in their order; each item goes to one process.

        The most expensive items are given out first, each to the process with the least to do.
        """
        loads = [0.0] * self.size
        own_indices: set[int] = set()
        for index in sorted(range(len(items)), key=lambda i: -cost(items[i])):
            rank = loads.index(min(loads))
            loads[rank] += cost(items[index])
            if rank == self.rank:
                own_indices.add(index)
        return [item for index, item in enumerate(items) if index in own_indices]

    def reduce(self, value: Item, function: Callable[[list[Item]], Result]) -> Result:
        """Return what a function makes of the values of all processes, in the order of their ranks.

        The function is called in the first process; all get the result. Every process must come here, or fail.
        """
        if self.size == 1:
            return function([value])
        values = self.gather(value)
        result = [None if values is None else function(values)]
        self.barrier()
        with self._connection():
            self._dist.broadcast_object_list(result, src=0, group=self._group)
        return result[0]  # type: ignore[return-value]

    def all_gather(self, value: Item) -> list[Item]:
        """Return the values of all processes, in the order of their ranks, in every process."""
        return self.reduce(value, list)

    def gather(self, value: Item) -> list[Item] | None:
        """Return the values of all processes, in the order of their ranks, in the first process; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        self.barrier()
        with self._connection():
            self._dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def gather_dict(self, own: Mapping[Key, Item]) -> dict[Key, Item]:
        """Gather dicts in the first process, one item at a time to bound memory; elsewhere return one's own."""
        gathered, items = dict(own), list(own.items())
        for start in range(max(self.all_gather(len(items)))):
            gathered.update(itertools.chain(*self.gather(items[start : start + 1]) or ()))
        return gathered

    def barrier(self, failure: Exception | None = None) -> None:
        """Wait until all processes are here, or have failed.

        Args:
            failure: The exception with which this process has failed; None: it has not.

        Raises:
            PcbPeftError: One has failed: its error, in all processes.
        """
        if self.size == 1:
            return
        reports: list[tuple[type[PcbPeftError], str] | None] = [None] * self.size
        with self._connection():
            self._meet()
            self._dist.all_gather_object(reports, _report_of(failure), group=self._group)
        failures = [(rank, *report) for rank, report in enumerate(reports) if report]
        if failures:
            self._state = State.FAILED
            rank, kind, message = failures[0]
            all_failed = len(failures) == self.size
            one_message = len({message for _, _, message in failures}) == 1
            where = "" if all_failed and one_message else f"process {rank} of {self.size}: "
            raise kind(where + message) from failure

    @contextlib.contextmanager
    def together(self) -> Generator[None]:
        """Run the block in all processes; if one of them fails, all stop with its error.

        A process that is told to end leaves without a word; the others notice when they next meet.
        """
        try:
            yield
            self.barrier()
        except Exception as error:
            if self._state is State.WORKING:
                self.barrier(error)
            raise
        except BaseException:
            self.disconnect()
            raise

    def disconnect(self) -> None:
        """Leave without a word: nothing is said to the others any more."""
        meeting = self._state in (State.MEETING, State.STUCK)
        self._state = State.STUCK if meeting else State.GONE

    def shutdown(self, *, destroy: bool) -> None:
        """Wait until all processes are here, or gone.

        Args:
            destroy: Close the connections afterwards, if that is still possible.
        """
        if self._state in (State.WORKING, State.FAILED):
            with contextlib.suppress(RuntimeError):
                self._meet()
        if destroy and self._state is not State.STUCK:
            self._dist.destroy_process_group()

    def _meet(self) -> None:
        """Wait until all processes are here, so that what they then tell each other takes no time.

        It looks again and again instead of blocking in torch, so that a signal can end it.
        """
        pause = 1e-4
        state_before, self._state = self._state, State.MEETING  # torch takes no barrier back
        try:
            others: Any = self._dist.barrier(group=self._group, async_op=True)
            while not others.is_completed():
                time.sleep(pause)
                pause = min(1.2 * pause, LONGEST_PAUSE)
        except (KeyboardInterrupt, SystemExit) as error:
            self._state = State.STUCK
            atexit.register(end_process, getattr(error, "code", 128 + signal.SIGINT))
            raise
        except RuntimeError:  # one of the others is gone
            self._state = state_before
            raise
        self._state = state_before
        others.wait()

    @contextlib.contextmanager
    def _connection(self) -> Generator[None]:
        """Turn torch's error about a lost connection into one that says what to do."""
        try:
            yield
        except RuntimeError as error:
            self.disconnect()
            raise ProcessError(
                f"process {self.rank} of {self.size}: another process ended without a word (interrupted, or killed for "
                "memory?); see what the launcher says of it, and start fewer processes, or lower max_memory"
            ) from error


ALONE = Processes()

# The groups that this process has joined, the innermost last. A stack, because a merge inside of `all_processes` may be
# any of the public functions: they look here, so that callers need not pass the group through each of their own calls.
# It changes only where a group is joined or left, which happens in one thread, before and after all merges.
_joined_groups = [ALONE]


def union(parts: Iterable[Mapping[Key, Item]]) -> dict[Key, Item]:
    """Return one mapping of several."""
    return {key: item for part in parts for key, item in part.items()}


def current() -> Processes:
    """Return the processes that have joined, or this one alone."""
    return _joined_groups[-1]


@contextlib.contextmanager
def all_processes() -> Generator[Processes]:
    """Make the merges in this block together with all processes that ``accelerate launch`` or ``torchrun`` started.

    Every process must run the whole block, with the same arguments. Each merges its share of the modules; the first one
    writes; the bytes are those of a single process. A result is complete in the first process; elsewhere what another
    process merged is merged again if it is asked for. If one process fails, all leave the block with its error. A
    process that was started alone runs the block as it is.

    Yields:
        The processes; `is_main` tells the first one.

    Example:
        >>> from pcb_peft import all_processes
        >>> with all_processes() as processes:
        ...     if processes.is_main:
        ...         print(processes.size)
        1
    """
    with joined() as processes:
        signals = stoppable() if processes.size > 1 else contextlib.nullcontext()
        with signals, processes.together():
            yield processes


def rank_and_size() -> tuple[int, int]:
    """Number of this process and of all, as the launcher has them: also before they have joined, and after.

    Raises:
        ProcessError: The launcher's variables hold something else.
    """
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    numbers = all(re.fullmatch("[0-9]{0,9}", number) for number in (rank, size))
    if not numbers or (size and int(rank or 0) >= int(size)):
        raise ProcessError(
            f"RANK is {quoted(rank)} and WORLD_SIZE is {quoted(size)}; a launcher sets them to whole numbers, and RANK "
            "to the smaller one: start the command with accelerate launch or torchrun, or take both away"
        )
    return int(rank or 0), int(size or 1)


@contextlib.contextmanager
def joined() -> Generator[Processes]:
    """Join the processes that were started together, and leave together at the end of the block."""
    if current().size > 1 or rank_and_size()[1] == 1:
        yield current()
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState  # type: ignore[import-untyped]

    initialized_by_caller = dist.is_initialized()
    with dying_on_signals():  # torch waits for the others where Python hears of no signal
        _find_first_machine(os.environ.get("MASTER_ADDR", ""))
        try:
            PartialState(cpu=not torch.cuda.is_available())
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            # no address, a port that is taken, others that never come
            raise ProcessError(
                f"the {rank_and_size()[1]} processes that WORLD_SIZE names cannot join: {shown(error)}; start the "
                "command with accelerate launch or torchrun, or take WORLD_SIZE out of the environment"
            ) from error
    processes = Processes(dist.get_rank(), dist.get_world_size(), group)
    _joined_groups.append(processes)
    try:
        yield processes
    finally:
        _joined_groups.remove(processes)
        processes.shutdown(destroy=not initialized_by_caller)


def _find_first_machine(address: str) -> None:
    """Wait a little until the name of the first process's machine is known; torch would wait for minutes.

    Raises:
        ProcessError: Nobody knows it.
    """
    end = time.monotonic() + ADDRESS_SECONDS
    while address and (error := _lookup_error(address)):
        if isinstance(error, UnicodeError) or time.monotonic() >= end:
            raise ProcessError(
                f"MASTER_ADDR is {quoted(address)}, and no machine of that name is known ({shown(error)}); start the "
                "command with accelerate launch or torchrun, or correct it"
            ) from error
        time.sleep(min(0.2, ADDRESS_SECONDS))


def _lookup_error(address: str) -> Exception | None:
    """Look a machine up; the error if it is not known, or if its name cannot be one."""
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        return error
    return None


def stoppable() -> contextlib.AbstractContextManager[list[signal.Signals]]:
    """Let SIGINT, SIGTERM, SIGHUP and SIGQUIT end the block so that it cleans up; yields the signals that came."""
    return raising_on_signals(lambda: current().disconnect())


def _report_of(failure: Exception | None) -> tuple[type[PcbPeftError], str] | None:
    """The error that the other processes raise for a failure, as its type and message; None for none."""
    if failure is None:
        return None
    if isinstance(failure, PcbPeftError):
        return type(failure), str(failure)
    return ProcessError, f"{type(failure).__name__}: {failure}"
