"""Many processes that make one merge: who does what, what they tell each other, and how they stop together.

Processes are started by ``accelerate launch`` or ``torchrun`` and join in `all_processes`. Outside of it, and where
there is but one, every process is alone, and all of this is trivial. What processes tell each other goes over the CPU.
"""

import atexit
import contextlib
import datetime
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pcb_peft.errors import PcbPeftError, ProcessError

Item = TypeVar("Item")
Key = TypeVar("Key")
Result = TypeVar("Result")

PATIENCE = datetime.timedelta(
    days=7
)  # of one that waits for the others' work; a dead one is noticed at once
LONGEST_PAUSE = 0.05  # seconds between two looks whether the others have come
SAME_WISH = 3.0  # seconds in which a launcher repeats to each process the signal that all got


class Processes:
    """The processes of one merge, as one of them sees them.

    Attributes:
        rank: Which it is, from 0.
        size: How many there are.
        stopped: All know that one of them has failed.
        lost: This one does not talk any more: it was told to end, or another one is gone.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size = rank, size
        self.stopped = self.disconnected = self._stuck = False
        self._group = group

    @property
    def _dist(self) -> Any:
        """torch.distributed, imported once there are processes that talk: one alone may not need torch at all."""
        import torch.distributed

        return torch.distributed

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    def partition(self, items: Sequence[Item], cost: Callable[[Item], float]) -> list[Item]:
        """Those of the items that are this process's to work on, in their order; each is one process's.

        The most expensive are given out first, each to the process that has the least to do.
        """
        loads = [0.0] * self.size
        own: set[int] = set()
        for place in sorted(range(len(items)), key=lambda i: -cost(items[i])):
            rank = loads.index(min(loads))
            loads[rank] += cost(items[place])
            if rank == self.rank:
                own.add(place)
        return [item for place, item in enumerate(items) if place in own]

    def reduce(self, value: Item, function: Callable[[list[Item]], Result]) -> Result:
        """What `function` makes of the values of all processes, in the order of their ranks.

        It is called in the first process; all get the result. Every process must come here, or fail.
        """
        if self.size == 1:
            return function([value])
        values = self.gather(value)
        result = [None if values is None else function(values)]
        self.barrier()
        with self._talking():
            self._dist.broadcast_object_list(result, src=0, group=self._group)
        return result[0]  # type: ignore[return-value]

    def all_gather(self, value: Item) -> list[Item]:
        """The values of all processes, in the order of their ranks; everywhere."""
        return self.reduce(value, list)

    def gather(self, value: Item) -> list[Item] | None:
        """The values of all processes, in the first of them; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        self.barrier()
        with self._talking():
            self._dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def gather_dict(self, own: Mapping[Key, Item]) -> dict[Key, Item]:
        """In the first process what all have, elsewhere its own; what is large comes one by one."""
        held, items = dict(own), list(own.items())
        for start in range(max(self.all_gather(len(items)))):
            held.update(itertools.chain(*self.gather(items[start : start + 1]) or ()))
        return held

    def barrier(self, failure: Exception | None = None) -> None:
        """Waits until all processes are here, or have failed.

        Raises:
            PcbPeftError: One has failed: its error, in all processes.
        """
        if self.size == 1:
            return
        told: list[tuple[type[PcbPeftError], str] | None] = [None] * self.size
        with self._talking():
            self._meet()
            self._dist.all_gather_object(told, _told(failure), group=self._group)
        failures = [(rank, *failed) for rank, failed in enumerate(told) if failed]
        if failures:
            self.stopped = True
            rank, kind, message = failures[0]
            same = len({message for _, _, message in failures}) == 1
            common = same and len(failures) == self.size
            where = "" if common else f"process {rank} of {self.size}: "
            raise kind(where + message) from failure

    @contextlib.contextmanager
    def together(self) -> Generator[None]:
        """What is done in the block is done by all; if one of them fails, all stop with its error.

        One that is told to end goes without a word; the others notice when they next talk.
        """
        try:
            yield
            self.barrier()
        except Exception as error:
            if not (self.stopped or self.disconnected):
                self.barrier(error)
            raise
        except BaseException:
            self.disconnected = True
            raise

    def shutdown(self, *, destroy: bool) -> None:
        """Waits until all are here, or gone; then the connections may be destroyed."""
        if not self.disconnected:
            with contextlib.suppress(RuntimeError):
                self._meet()
        if destroy and not self._stuck:
            self._dist.destroy_process_group()

    def _meet(self) -> None:
        """Waits until all are here, as a signal can end it: what comes after that blocks, and takes no time."""
        pause = 1e-4
        try:
            self._stuck = True  # once it has called the others: nothing takes a barrier back
            others: Any = self._dist.barrier(group=self._group, async_op=True)
            while not others.is_completed():
                time.sleep(pause)
                pause = min(1.2 * pause, LONGEST_PAUSE)
            self._stuck = False
        except (KeyboardInterrupt, SystemExit) as error:
            atexit.register(_end, getattr(error, "code", 128 + signal.SIGINT))
            raise
        except RuntimeError:  # one of the others is gone
            self._stuck = False
            raise
        others.wait()

    @contextlib.contextmanager
    def _talking(self) -> Generator[None]:
        """Turns the error of a lost connection into words."""
        try:
            yield
        except RuntimeError as error:
            self.disconnected = True
            raise ProcessError(
                f"process {self.rank} of {self.size}: another one ended without a word (interrupted, or killed for "
                "memory?); see what the launcher says of it, and start fewer, or lower max_memory"
            ) from error


ALONE = Processes()
_processes = [ALONE]


def union(parts: Iterable[Mapping[Key, Item]]) -> dict[Key, Item]:
    """One mapping of several."""
    return {key: item for part in parts for key, item in part.items()}


def current() -> Processes:
    """The processes that have joined, or this one alone."""
    return _processes[-1]


@contextlib.contextmanager
def all_processes() -> Generator[Processes]:
    """All processes that ``accelerate launch`` or ``torchrun`` started make the merges in this block together.

    Every process must run the whole block, with the same arguments. A merge's modules are shared out over them; the
    first one writes; the bytes are those of a single process. A result is complete in the first process; elsewhere what
    another process merged is merged again if it is asked for. If one process fails, all leave the block with its error.
    """
    with joined() as processes:
        signals = stoppable() if processes.size > 1 else contextlib.nullcontext()
        with signals, processes.together():
            yield processes


@contextlib.contextmanager
def joined() -> Generator[Processes]:
    """The processes that were started together; they leave the block together."""
    if current().size > 1 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield current()
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState  # type: ignore[import-untyped]

    theirs = dist.is_initialized()
    PartialState(cpu=not torch.cuda.is_available())
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    processes = Processes(dist.get_rank(), dist.get_world_size(), group)
    _processes.append(processes)
    try:
        yield processes
    finally:
        _processes.remove(processes)
        processes.shutdown(destroy=not theirs)


@contextlib.contextmanager
def stoppable() -> Generator[list[signal.Signals]]:
    """SIGINT and SIGTERM end the block in such a way that it cleans up, a second one as it is; yields what has come."""
    came: list[signal.Signals] = []
    since = 0.0

    def leave(number: int, frame: object) -> None:
        nonlocal since
        del frame
        if came and time.monotonic() - since > SAME_WISH:
            os._exit(128 + number)
        if not came:
            came.append(signal.Signals(number))
            since = time.monotonic()
            current().disconnected = True
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()  # only the main thread is told
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in heard}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(code: int) -> None:
    """Ends the process at once, where torch would first wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _told(failure: Exception | None) -> tuple[type[PcbPeftError], str] | None:
    """What others are told of a failure."""
    if failure is None or isinstance(failure, PcbPeftError):
        return failure and (type(failure), str(failure))
    return ProcessError, f"{type(failure).__name__}: {failure}"
