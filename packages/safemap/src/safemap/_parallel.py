"""Running the pieces of one read on a few threads.

``preadv`` and torch's copies release the interpreter lock, so threads read at the same time.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

from safemap._locks import ForkSafeLock

Piece = TypeVar("Piece")
_MAX_THREADS = 8

_executor: ThreadPoolExecutor | None = None
_queue: "SimpleQueue[Callable[[], object]] | None" = None
_queue_lock = ForkSafeLock()


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

    is_inference = torch.is_inference_mode_enabled()  # else what was made here must not be written to there

    def help_out() -> None:
        with torch.inference_mode(is_inference):
            work()

    futures = [_helpers().submit(help_out) for _ in range(helpers)]
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
    """Run *task* in the background when all that were given here before are done.

    What is not done when the interpreter exits is dropped: nobody will use it.
    """
    global _queue
    with _queue_lock:
        if _queue is None:
            _queue = SimpleQueue()
            worker = threading.Thread(
                target=_work_off, args=(_queue,), name="safemap-one-by-one", daemon=True
            )
            worker.start()
    _queue.put(task)


def _work_off(queue: "SimpleQueue[Callable[[], object]]") -> None:
    while True:
        task = queue.get()
        with contextlib.suppress(Exception):  # nobody waits for it
            task()
        del task  # nor needs what it holds


def _helpers() -> ThreadPoolExecutor:
    global _executor
    if _executor is None:
        _executor = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="safemap")
    return _executor


def _forget_helpers() -> None:
    global _executor, _queue
    _executor = _queue = None  # a forked child has the object, but not its threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)
