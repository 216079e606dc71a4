"""Running the pieces of one read on a few threads.

``preadv`` and torch's copies release the interpreter lock, so threads read at the same time.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

import torch

from safemap._locks import ForkSafe

Piece = TypeVar("Piece")
_MAX_THREADS = 8


class _Workers(ForkSafe):
    """Threads that do what they are given, in the order in which it is given, as soon as one of them is free.

    Much less is done for each task than by ``concurrent.futures``: reading a small layer takes no longer than
    that. What is not done when the interpreter exits is dropped.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)  # a child has the object, but not its threads

    def _forget(self) -> None:
        self._queue: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._count = 0

    def submit(self, task: Callable[[], object], threads: int) -> None:
        """Have *task* done by one of *threads* threads; it is dropped if there can be none."""
        if self._count < threads:
            self._start(threads)
        if self._count:
            self._queue.put(task)

    def _start(self, threads: int) -> None:
        # there may be too many threads already, or the interpreter is ending
        with self._lock, contextlib.suppress(RuntimeError):
            while self._count < threads:
                name = f"{self._name}-{self._count}"
                threading.Thread(target=_work_off, args=(self._queue,), name=name, daemon=True).start()
                self._count += 1


def _work_off(queue: "SimpleQueue[Callable[[], object]]") -> None:
    while True:
        task = queue.get()
        with contextlib.suppress(Exception):
            task()
        del task  # nobody needs what it holds


_helpers = _Workers("safemap")
_background = _Workers("safemap-one-by-one")


def default_threads() -> int:
    """Return how many threads read one large tensor: as many as there are cores, at most four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def for_each(task: Callable[[Piece], None], pieces: Sequence[Piece], threads: int) -> None:
    """Call *task* for every piece, on *threads* threads, this one included; an error is raised."""
    helpers = min(threads, len(pieces), _MAX_THREADS) - 1
    if helpers < 1:
        for piece in pieces:
            task(piece)
        return
    queue = iter(pieces)  # next() on an iterator of a sequence is atomic under the interpreter lock
    tickets = iter(range(helpers))  # who finds none left comes too late to help
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    is_inference = torch.is_inference_mode_enabled()  # else what was made here must not be written to there

    def help_out() -> None:
        if next(tickets, None) is None:
            return
        try:
            with torch.inference_mode() if is_inference else contextlib.nullcontext():
                for piece in queue:
                    task(piece)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    try:
        for _ in range(helpers):
            _helpers.submit(help_out, _MAX_THREADS)
        for piece in queue:
            task(piece)
    finally:
        late = sum(1 for _ in tickets)
        # wait: no thread may write into memory that the caller has given up
        results = [ended.get() for _ in range(helpers - late)]
    failed = [result for result in results if result is not None]
    if failed:
        try:
            raise failed[0]
        finally:
            del failed, results  # the traceback holds this frame, and with it what was read into


def one_by_one(task: Callable[[], object]) -> None:
    """Run *task* in the background when all that were given here before are done.

    What is not done when the interpreter exits is dropped: nobody will use it.
    """
    _background.submit(task, 1)
