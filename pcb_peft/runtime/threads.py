"""Threads: items that are worked on side by side, one thread each, and code that must run on one thread alone."""

import collections
import concurrent.futures
import contextlib
import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """Run the block without the threads of BLAS and LAPACK, whose number decides how a sum is rounded.

    Only calls from this Python thread are affected: merges in other Python threads keep their numbers, and when all
    have ended, `torch.get_num_threads()` is everywhere what it was.
    """
    before = _set_own_threads(1)
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], most: int | None = None
) -> Iterator[Result]:
    """Call a function on every item, on as many Python threads as torch would use; yield the results in order.

    Tiles, and the decompositions of a module, are too small to be split over threads; so each thread works on whole
    ones, and none of them, nor the caller until all is done, has further threads of its own.

    Args:
        function: What to do with an item.
        items: The items; they are taken in the caller's thread.
        most: At most so many threads.
    """
    workers = min(torch.get_num_threads(), most or torch.get_num_threads())
    with one_thread():
        items = iter(items)
        first_two = list(itertools.islice(items, 2))
        workers = workers if len(first_two) > 1 else 1
        yield from side_by_side(function, itertools.chain(first_two, items), workers)


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result]:
    """`map` on so many Python threads, each without further threads of its own.

    Items are taken in the caller's thread, and results yielded there in order; few are in flight, which bounds the
    memory. With one worker, the caller's thread does the work itself.
    """
    if workers == 1:
        yield from map(function, items)
        return
    queue: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(
        workers, initializer=_set_own_threads, initargs=(1,)
    ) as pool:
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) > 2 * workers:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def _set_own_threads(count: int) -> int:
    """Set how many threads torch uses in calls from this Python thread; return how many it used before.

    torch keeps one number per Python thread, and a last one with which new Python threads start. `set_num_threads` sets
    both. The latter is put back by a thread that ends at once, or else a thread that happens to start now would keep
    `count` for ever, and hand it on.
    """
    before = torch.get_num_threads()  # a thread that never asked takes the last number anew
    if before == count:
        return before
    torch.set_num_threads(count)
    restore = threading.Thread(target=torch.set_num_threads, args=(before,))
    restore.start()
    restore.join()
    if torch.get_num_threads() != count:  # a torch without OpenMP has one number for all threads
        torch.set_num_threads(count)
    return before
