"""Work that is shared out among threads, whole items to each; and work that is not."""

import collections
import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """Without the threads of BLAS and LAPACK: how they share out a sum decides how it is rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], most: int | None = None
) -> Iterator[Result]:
    """`side_by_side` on as many threads as torch would use, or `most`, with a caller that has no others either.

    Tiles and the decompositions of a module are too small to be shared by threads, so each thread takes whole ones.
    """
    workers = min(torch.get_num_threads(), most or torch.get_num_threads())
    with one_thread():
        items = iter(items)
        first = list(itertools.islice(items, 2))
        workers = workers if len(first) > 1 else 1
        yield from side_by_side(function, itertools.chain(first, items), workers)


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result]:
    """`map` on so many threads, each without threads of its own; the few items in flight bound the memory.

    The caller's thread takes the items from where they come, and is told of the results in their order. A single
    worker is that thread itself.
    """
    if workers == 1:
        yield from map(function, items)
        return
    queue: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers, initializer=_alone) as pool:
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) > 2 * workers:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def _alone() -> None:
    """Takes torch's other threads from a new one."""
    torch.get_num_threads()  # a thread that has not been asked yet gets the number that others set last
    torch.set_num_threads(1)
