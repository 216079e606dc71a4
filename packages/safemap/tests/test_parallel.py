"""The pieces of one read are shared by a few threads."""

import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from safemap import _parallel
from safemap._parallel import for_each


@pytest.fixture(autouse=True)
def _fresh_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_parallel, "_helpers", _parallel._Workers("safemap-test"))


def both_at_once(threads: int = 2) -> list[int]:
    """Return the threads that do pieces, each of which waits for one of another thread."""
    meet, seen = threading.Barrier(threads, timeout=10), []

    def task(piece: int) -> None:
        meet.wait()
        seen.append(threading.get_ident())

    for_each(task, range(threads), threads)
    return seen


def test_every_piece_is_done_once() -> None:
    done: list[int] = []
    for_each(done.append, range(1000), 4)
    assert sorted(done) == list(range(1000))
    for_each(done.append, [], 4)
    assert len(done) == 1000


def test_the_caller_helps_and_threads_are_used_again() -> None:
    first, second = both_at_once(), both_at_once()
    assert threading.get_ident() in first
    assert len(set(first)) == len(set(second)) == 2
    assert len({*both_at_once(3), *first, *second}) <= _parallel._MAX_THREADS + 1


@pytest.mark.parametrize("fails_in_caller", [True, False])
def test_an_error_is_raised_when_no_thread_works_any_more(fails_in_caller: bool) -> None:
    caller, meet, busy = threading.get_ident(), threading.Barrier(2, timeout=10), []

    def task(piece: int) -> None:
        meet.wait()
        if (threading.get_ident() == caller) == fails_in_caller:
            raise OSError("the disk is gone")
        busy.append(1)
        time.sleep(0.05)
        busy.pop()

    with pytest.raises(OSError, match="the disk is gone"):
        for_each(task, range(2), 2)
    assert not busy
    assert len(both_at_once()) == 2  # the helper lives


def test_an_error_of_a_helper_keeps_nothing_alive() -> None:
    class Memory:
        pass

    def fail() -> "weakref.ref[Memory]":
        memory, caller, meet = Memory(), threading.get_ident(), threading.Barrier(2, timeout=10)

        def task(piece: int) -> None:
            assert memory
            meet.wait()
            if threading.get_ident() != caller:
                raise OSError

        try:
            for_each(task, range(2), 2)
        except OSError:
            return weakref.ref(memory)
        raise AssertionError

    gc.collect()
    gc.disable()
    try:
        gone = fail()
        for _ in range(100):
            if gone() is None:
                return
            time.sleep(0.01)  # the helper may not have dropped its task yet
        raise AssertionError("the memory is still referred to")
    finally:
        gc.enable()


def test_helpers_that_are_busy_are_not_waited_for() -> None:
    begun, gate = threading.Semaphore(0), threading.Event()

    def wait(piece: int) -> None:
        begun.release()
        gate.wait(10)

    count = _parallel._MAX_THREADS
    other = threading.Thread(target=for_each, args=(wait, range(count), count))
    third = threading.Thread(target=for_each, args=(wait, range(2), 2))
    for thread in (other, third):
        thread.start()
    for _ in range(count + 2):  # all helpers, and the two that called them
        assert begun.acquire(timeout=10)
    done: list[int] = []
    for_each(done.append, range(5), 4)
    assert done == list(range(5))
    gate.set()
    for thread in (other, third):
        thread.join()


def test_without_helpers_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    for_each(done.append, range(5), 4)
    assert done == list(range(5))


@pytest.fixture
def tensor() -> Iterator[torch.Tensor]:
    with torch.inference_mode():
        yield torch.zeros(2)


def test_helpers_write_to_inference_tensors(tensor: torch.Tensor) -> None:
    meet = threading.Barrier(2, timeout=10)

    def task(piece: int) -> None:
        meet.wait()
        tensor[piece] = 1

    with torch.inference_mode():
        for_each(task, range(2), 2)
    assert tensor.tolist() == [1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_gets_helpers_of_its_own() -> None:
    both_at_once()
    child = os.fork()
    if not child:
        os._exit(0 if len(set(both_at_once())) == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
