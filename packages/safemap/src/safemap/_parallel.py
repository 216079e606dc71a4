"""Running the pieces of one read on a few threads.

``preadv`` and torch's copies release the interpreter lock, so threads read at the same time.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Piece = TypeVar("Piece")
_MAX_THREADS = 8

_executor: ThreadPoolExecutor | None = None
_single: ThreadPoolExecutor | None = None


def default_threads() -> int:
    """Return how many threads read one large tensor: as many as there are cores, at most four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def for_each(task: Callable[[Piece], None], pieces: Sequence[Piece], threads: int) -> None:
    """Call *task* for every piece, on *threads* threads, this one included; the first error is raised."""
    helpers = min(threads, len(pieces), _MAX_THREADS) - 1
    if helpers < 1:
        for piece in pieces:
            task(piece)
        return
    queue = iter(pieces)  # next() on an iterator of a sequence is atomic under the interpreter lock

    def work() -> None:
        for piece in queue:
            task(piece)

    futures = [_helpers().submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        for future in futures:
            if not future.cancel():
                future.exception()  # wait: no thread may write into memory that the caller has given up
    for future in futures:
        if not future.cancelled():
            future.result()


def one_by_one(task: Callable[[], object]) -> None:
    """Run *task* in the background when all that were given here before are done."""
    global _single
    if _single is None:
        _single = ThreadPoolExecutor(1, thread_name_prefix="safemap-one-by-one")
    _single.submit(task)


def _helpers() -> ThreadPoolExecutor:
    global _executor
    if _executor is None:
        _executor = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="safemap")
    return _executor


def _forget_helpers() -> None:
    global _executor, _single
    _executor = _single = None  # a forked child has the object, but not its threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)
