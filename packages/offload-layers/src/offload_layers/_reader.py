"""The thread that fetches weights while the model computes.

It starts with the first job and ends with its owner, or with the interpreter. A job that fails is forgotten:
the layer then fetches by itself, and the error is raised where it belongs.
"""

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from typing import Generic, TypeVar

_log = logging.getLogger("offload_layers.reader")
Result = TypeVar("Result")


class _Stage(Enum):
    QUEUED = auto()
    RUNNING = auto()
    DONE = auto()


class Job(Generic[Result]):
    """Something to be done on the reader's thread. The reader changes it, under its lock."""

    __slots__ = ("_is_awaited", "_is_dropped", "_on_drop", "_result", "_stage", "_task")

    def __init__(self, task: Callable[[], Result | None], on_drop: Callable[[], None]) -> None:
        """Describe a job.

        Args:
            task: What to do.
            on_drop: Called once if the result will not be used, after the task has ended.
        """
        self._task: Callable[[], Result | None] | None = task
        self._on_drop = on_drop
        self._stage = _Stage.QUEUED
        self._result: Result | None = None
        self._is_awaited = self._is_dropped = False

    @property
    def is_done(self) -> bool:
        """Whether the result can be had without waiting."""
        return self._stage is _Stage.DONE


class Reader:
    """Does jobs in the order in which they are submitted."""

    def __init__(self) -> None:
        self._queue: deque[Job[object]] = deque()
        self._running: Job[object] | None = None
        self._thread: int | None = None
        self._is_draining = False
        self._changed = threading.Condition(threading.Lock())
        self._executor: ThreadPoolExecutor | None = None
        _READERS.add(self)

    def submit(self, job: "Job[Result]") -> None:
        """Have *job* done."""
        with self._changed:
            self._queue.append(job)  # type: ignore[arg-type]
            if self._is_draining:
                return
            self._is_draining = True
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="offload-layers-reader")
        try:
            self._executor.submit(self._drain)
        except RuntimeError:  # the interpreter is ending; whoever wants the job's result does it itself
            self._is_draining = False

    def result(self, job: "Job[Result]") -> Result | None:
        """Return what the task of *job* returned, waiting if it has begun.

        None if it failed, or if it has not begun: then it never will, and the caller is faster by itself.
        """
        with self._changed:
            if job._stage is _Stage.QUEUED:
                self._queue.remove(job)  # type: ignore[arg-type]
                job._stage = _Stage.DONE
            while job._stage is not _Stage.DONE:
                job._is_awaited = True
                self._changed.wait()
            return job._result

    def drop(self, job: "Job[Result]") -> None:
        """Make sure that nothing of *job* is left, now or when its task ends."""
        with self._changed:
            if job._stage is _Stage.RUNNING:
                job._is_dropped = True
                return
            if job._stage is _Stage.QUEUED:
                self._queue.remove(job)  # type: ignore[arg-type]
                job._stage = _Stage.DONE
            job._result = None
        job._on_drop()

    def finish_running(self, *, only_dropped: bool = False) -> None:
        """Wait for the job that is being done now, if there is one; also until it is dropped, if it was.

        Called by a job itself, as by a destructor that happens to run in it, do nothing.

        Args:
            only_dropped: Do not wait for a job whose result may still be used.
        """
        with self._changed:
            job = None if threading.get_ident() == self._thread else self._running
            if job is not None and only_dropped and not job._is_dropped:
                return
            while job is not None and self._running is job:
                job._is_awaited = True
                self._changed.wait(1)

    def settle(self) -> None:
        """Wait until everything that was submitted is done."""
        with self._changed:
            while self._is_draining:
                self._changed.wait(1)

    def _drain(self) -> None:
        self._thread = threading.get_ident()
        try:
            while True:
                with self._changed:
                    if not self._queue:
                        self._is_draining = False
                        self._changed.notify_all()
                        return
                    job = self._running = self._queue.popleft()
                    job._stage = _Stage.RUNNING
                self._run(job)
                del job  # waiting for the next one must not keep the tensors of this one
        except BaseException:  # an interrupt between two jobs: the next submission begins anew
            self._is_draining = False
            raise

    def _run(self, job: Job[object]) -> None:
        task, job._task = job._task, None
        result = None
        try:
            result = task() if task is not None else None
        except Exception:
            _log.debug("fetching ahead failed; the layer will fetch by itself", exc_info=True)
        finally:
            with self._changed:
                job._stage = _Stage.DONE
                is_dropped = job._is_dropped
                if not is_dropped:
                    job._result = result
            del result
            if is_dropped:
                job._on_drop()
            with self._changed:
                self._running = None
                if job._is_awaited:
                    self._changed.notify_all()

    def _forget_thread(self) -> None:
        """Start anew in a forked child, which has no thread and may have found the lock taken."""
        self._changed = threading.Condition(threading.Lock())
        self._executor = self._thread = None
        self._is_draining = False
        lost, self._running = [*self._queue, self._running], None
        self._queue.clear()
        for job in lost:
            if job is not None:
                job._stage = _Stage.DONE


_READERS: "weakref.WeakSet[Reader]" = weakref.WeakSet()


def _after_fork() -> None:
    for reader in list(_READERS):
        reader._forget_thread()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
