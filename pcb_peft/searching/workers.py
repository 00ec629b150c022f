"""Several trials at a time, each in a process of its own."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from pcb_peft.errors import OptionError, ProcessError
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.signals import ENDING, REPEAT_SECONDS, end_process, raising_on_signals
from pcb_peft.searching.trials import Proposal, Trial
from pcb_peft.searching.trying import Trier

SIGNALLED = 128 + signal.SIGTERM  # exit status, as shells have it
TryAll = Callable[[Sequence[Proposal]], Iterator[Trial]]
"""A function that tries several proposals, and returns their trials in order, each as soon as it is done."""


@contextlib.contextmanager
def trying(trier: Trier, make_trier: Callable[[], Trier], workers: int) -> Generator[TryAll]:
    """Make a function that tries several proposals at a time.

    Args:
        trier: Tries in this process.
        make_trier: Makes what tries in another process; it must be picklable.
        workers: How many processes; 1: this one.

    Raises:
        OptionError: Processes of `accelerate launch` do one trial together, or the data cannot be sent to a process.
        ProcessError: A process was killed.
    """
    if workers < 1:
        raise OptionError(f"workers is {workers}; it must be 1 or more")
    if workers == 1:
        yield lambda proposals: map(trier, proposals)
        return
    if current().size > 1:
        raise OptionError(
            "workers: the processes of accelerate launch share out the texts of one trial; use one of the two"
        )
    try:
        pickle.dumps(make_trier)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise OptionError(
            f"workers={workers}: what measures a task cannot be sent to another process ({error}); define functions at "
            "the top of a module, or take workers=1"
        ) from error
    trier.validation.release()
    with _pool(make_trier, workers) as pool:

        def try_all(proposals: Sequence[Proposal]) -> Iterator[Trial]:
            with _starting_without_signals():
                return pool.map(_try, proposals)

        try:
            yield try_all
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ProcessError(
                "a process that tried merges was stopped, perhaps for want of memory; take fewer workers"
            ) from error


@contextlib.contextmanager
def _pool(
    make_trier: Callable[[], Trier], workers: int
) -> Generator[concurrent.futures.ProcessPoolExecutor]:
    """Start processes that try; if the block ends with an exception, they end at once and not after their trials."""
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a fork of a process that has run torch may hang
        initializer=_begin,
        initargs=(make_trier, workers),
    )
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_trier: list[Trier] = []  # of this process
_signals = contextlib.ExitStack()  # to the end of a process that tries


@contextlib.contextmanager
def _starting_without_signals() -> Generator[None]:
    """Start processes in this block that do not receive Ctrl-C and the like: this process does, and ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set(ENDING) - {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _begin(make_trier: Callable[[], Trier], workers: int) -> None:
    import torch

    threading.Thread(target=_end_with_the_search, daemon=True).start()
    _signals.enter_context(raising_on_signals(lambda: None))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    with _ending():
        _trier.append(make_trier())


def _try(proposal: Proposal) -> Trial:
    with _ending():
        return _trier[0](proposal)


@contextlib.contextmanager
def _ending() -> Generator[None]:
    """End this process after a signal, once the block has cleaned up, instead of going on with the next trial."""
    try:
        yield
    except SystemExit:
        end_process(SIGNALLED)


def _end_with_the_search() -> None:
    """End this process when the one that started it was killed; it would wait for ever for the next trial."""
    search = multiprocessing.parent_process()
    if search is not None:
        search.join()
        os.kill(os.getpid(), signal.SIGTERM)  # cleans up
        time.sleep(REPEAT_SECONDS)
        end_process(SIGNALLED)
