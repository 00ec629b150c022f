"""Several trials at a time, each in a process of its own."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import pickle
from collections.abc import Callable, Generator, Iterator, Sequence

from pcb_peft.errors import OptionError, ProcessError
from pcb_peft.runtime.processes import current
from pcb_peft.searching.trials import Proposal, Trial
from pcb_peft.searching.trying import Trier

TryAll = Callable[[Sequence[Proposal]], Iterator[Trial]]
"""A function that tries several proposals, and returns their trials in order, each as soon as it is done."""


@contextlib.contextmanager
def trying(here: Trier, there: Callable[[], Trier], workers: int) -> Generator[TryAll]:
    """Make a function that tries several proposals at a time.

    Args:
        here: Tries in this process.
        there: Makes what tries in another process; it must be picklable.
        workers: How many processes; 1: this one.

    Raises:
        OptionError: Processes of `accelerate launch` do one trial together, or the data cannot be sent to a process.
        ProcessError: A process was killed.
    """
    if workers < 1:
        raise OptionError(f"workers is {workers}; it must be 1 or more")
    if workers == 1:
        yield lambda proposals: map(here, proposals)
        return
    if current().size > 1:
        raise OptionError(
            "workers: the processes of accelerate launch share out the texts of one trial; use one of the two"
        )
    try:
        pickle.dumps(there)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise OptionError(
            f"workers={workers}: what measures a task cannot be sent to another process ({error}); define functions at "
            "the top of a module, or take workers=1"
        ) from error
    here.validation.release()
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a fork of a process that has run torch may hang
        initializer=_begin,
        initargs=(there, workers),
    ) as pool:
        try:
            yield lambda proposals: pool.map(_try, proposals)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise ProcessError(
                "a process that tried merges was stopped, perhaps for want of memory; take fewer workers"
            ) from error


_trier: list[Trier] = []  # of this process


def _begin(make: Callable[[], Trier], workers: int) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _trier.append(make())


def _try(proposal: Proposal) -> Trial:
    return _trier[0](proposal)
