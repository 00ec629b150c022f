"""Work that is shared out over threads, a whole item to each."""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from pcb_peft.linalg import one_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], most: int | None = None
) -> Iterator[Result]:
    """`map`, on as many threads as torch would use, or `most`; the few items in flight bound the memory.

    Tiles and the decompositions of a module are too small to be shared by threads, so each thread takes whole ones.
    """
    workers = min(torch.get_num_threads(), most or torch.get_num_threads())
    with one_thread():
        items = iter(items)
        first = list(itertools.islice(items, 2))
        if workers == 1 or len(first) < 2:
            yield from map(function, itertools.chain(first, items))
            return
        queue: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            for item in itertools.chain(first, items):
                queue.append(pool.submit(function, item))
                if len(queue) > 2 * workers:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
