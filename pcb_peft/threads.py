"""Work that is shared out among threads, whole items to each."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


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
