"""What Python threads that merge at the same time leave behind: nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch

from pcb_peft import merge_adapters
from pcb_peft.runtime.threads import in_order, one_thread, side_by_side

THREADS = 3


@pytest.fixture(autouse=True)
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def number_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def check_as_before():
    assert torch.get_num_threads() == number_of_a_new_thread() == THREADS


def test_a_block_is_alone_and_leaves_the_number_as_it_was():
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    check_as_before()


def test_an_error_leaves_the_number_as_it_was():
    with pytest.raises(RuntimeError, match="stop"), one_thread():
        raise RuntimeError("stop")
    check_as_before()


def test_a_thread_that_starts_meanwhile_does_not_inherit_the_one():
    with one_thread():
        assert number_of_a_new_thread() == THREADS
        assert torch.get_num_threads() == 1


def test_the_main_threads_block_may_end_first_or_last():
    """Of two blocks that overlap, in either order: what each finds in it, and after it."""
    for main_ends_first in (True, False):
        entered, ended = threading.Event(), threading.Event()
        seen = []

        def other(entered=entered, ended=ended, seen=seen, wait=main_ends_first):
            with one_thread():
                entered.set()
                if wait:
                    ended.wait(60)
                seen.append(torch.get_num_threads())
            seen.append(torch.get_num_threads())
            if not wait:
                ended.set()

        thread = threading.Thread(target=other)
        with one_thread():
            thread.start()
            entered.wait(60)
            if not main_ends_first:
                ended.wait(60)
            assert torch.get_num_threads() == 1
        ended.set()
        thread.join()
        assert seen == [1, THREADS]
        check_as_before()


def test_threads_that_work_side_by_side_have_one_each_and_leave_no_trace():
    assert set(side_by_side(lambda _: torch.get_num_threads(), range(20), 2)) == {1}
    assert set(in_order(lambda _: torch.get_num_threads(), range(20))) == {1}
    check_as_before()


def test_merges_in_two_threads_make_the_same_bytes_and_leave_the_number(shared_workshop):
    paths = [
        str(path)
        for path in shared_workshop.adapters(
            "llama", [peft.LoraConfig(r=r, target_modules=["q_proj", "v_proj"]) for r in (2, 3)]
        )
    ]

    def merge() -> dict[str, bytes]:
        merged = merge_adapters(paths, method="pcb", scope="global", progress=False)
        return {module: merged.delta(module).numpy().tobytes() for module in merged.modules}

    expected = merge()
    start = threading.Barrier(2)

    def merge_at_once(_: int) -> tuple[list[dict[str, bytes]], int]:
        torch.get_num_threads()  # a thread that has not asked yet gets the number that others set last
        start.wait(60)
        return [merge() for _ in range(3)], torch.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(merge_at_once, range(2)))
    assert all(bytes_ == expected for merges, _ in results for bytes_ in merges)
    assert [number for _, number in results] == [THREADS, THREADS]
    check_as_before()
