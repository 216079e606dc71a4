"""Fetching the weights of the layers that come next while this one computes.

One reader thread fetches at a time; how far ahead it may be is bounded in bytes, and by the budget of the
compute device. What it has fetched is used only if the layer's weights are still the ones that were there
when it began. A fetch that fails is forgotten: the layer then fetches by itself, and the error is raised
where it belongs.
"""

import os
import threading
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from offload_layers._budget import Lease
from offload_layers._changes import Fingerprint
from offload_layers._order import ExecutionOrder

MadeFrom = list[tuple[nn.Parameter, Fingerprint]]


class Fetchable(Protocol):
    """A layer, as its prefetcher sees it."""

    @property
    def staging_nbytes(self) -> int:
        """Bytes that a staged copy of the weights takes now; 0 if the layer needs none."""

    def lease_ahead(self) -> Lease | None:
        """Borrow the bytes of a staged copy, or return None if they do not fit beside what is there."""

    def at_rest(self) -> MadeFrom:
        """Return the parameters that a staged copy is made from, with their fingerprints."""

    def fetch(self) -> list[Tensor]:
        """Return the weights in the computation placement, without gradients; called on another thread."""

    def enter(self) -> None:
        """Stage the weights."""

    def leave(self) -> None:
        """End what ``enter`` began."""


@dataclass(frozen=True)
class Fetched:
    """Weights that are ready to compute with, and the bytes borrowed for them."""

    tensors: list[Tensor]
    lease: Lease


@dataclass(frozen=True)
class _Job:
    future: "Future[list[Tensor]]"
    lease: Lease
    made_from: MadeFrom


@dataclass(frozen=True)
class PrefetchStatistics:
    """How often a layer's weights were ready, were on their way, or had to be fetched by the layer itself."""

    hits: int
    waits: int
    misses: int


class Prefetcher:
    """Fetches ahead for the layers of one model."""

    def __init__(self) -> None:
        self._order: ExecutionOrder[Fetchable] = ExecutionOrder()
        self._jobs: dict[weakref.ref[Fetchable], _Job] = {}
        self._lock = threading.Lock()
        self._held: weakref.ref[Fetchable] | None = None
        self._largest = 0
        self._executor: ThreadPoolExecutor | None = None
        self._pid = 0
        self._hits = self._waits = self._misses = 0

    def take(self, layer: Fetchable) -> Fetched | None:
        """Return what was fetched for *layer*, waiting if it is on its way, or None."""
        with self._lock:
            self._order.saw(layer)
            self._largest = max(self._largest, layer.staging_nbytes)
            job = self._jobs.pop(weakref.ref(layer), None)
            if job is None:
                self._misses += 1
                return None
            if job.future.done():
                self._hits += 1
            else:
                self._waits += 1
        tensors = self._result(job)
        if tensors is None or not _same(job.made_from, layer.at_rest()):
            job.lease.give_back()
            return None
        return Fetched(tensors, job.lease)

    def start_after(self, layer: Fetchable) -> None:
        """Begin to fetch for the layers that follow *layer*, as far as the bound allows."""
        with self._lock:
            upcoming = []
            ahead = 0
            for following in self._order.upcoming():
                nbytes = following.staging_nbytes
                if ahead and ahead + nbytes > 2 * self._largest:
                    break
                if nbytes and following is not layer:
                    upcoming.append(following)
                    ahead += nbytes
            expected = {weakref.ref(following) for following in upcoming}
            for reference in [r for r in self._jobs if r not in expected]:
                self._drop(self._jobs.pop(reference))
            for following in upcoming:
                reference = weakref.ref(following)
                if reference in self._jobs:
                    continue
                lease = following.lease_ahead()
                if lease is None:
                    break
                made_from = following.at_rest()  # noted before the fetch begins: see take()
                self._jobs[reference] = _Job(self._pool().submit(following.fetch), lease, made_from)

    def hold(self, layer: Fetchable) -> None:
        """Keep *layer* staged until another layer is used: its weights are being read from outside."""
        layer.enter()
        with self._lock:
            before, self._held = self._held, weakref.ref(layer)
        self._leave(before)

    def let_go(self, *, but: Fetchable | None = None) -> None:
        """End what ``hold`` began, unless it is *but* that is held."""
        if self._held is None:
            return
        with self._lock:
            if self._held is None or (but is not None and self._held() is but):
                return
            before, self._held = self._held, None
        self._leave(before)

    @staticmethod
    def _leave(held: "weakref.ref[Fetchable] | None") -> None:
        layer = None if held is None else held()
        if layer is not None:
            layer.leave()

    def forget(self) -> None:
        """Drop everything that was fetched ahead."""
        with self._lock:
            while self._jobs:
                self._drop(self._jobs.popitem()[1])

    def statistics(self) -> PrefetchStatistics:
        """Return a snapshot."""
        return PrefetchStatistics(self._hits, self._waits, self._misses)

    def _pool(self) -> ThreadPoolExecutor:
        if self._executor is None or self._pid != os.getpid():  # a fork takes no threads along
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="offload-layers-reader")
            self._pid = os.getpid()
        return self._executor

    @staticmethod
    def _result(job: _Job) -> list[Tensor] | None:
        if job.future.cancel():  # not begun: the layer is faster by itself
            return None
        try:
            return job.future.result()
        except (Exception, CancelledError):  # the layer meets the same error itself, or succeeds
            return None

    @staticmethod
    def _drop(job: _Job) -> None:
        if not job.future.cancel():
            # its memory is there until the thread is done with it
            job.future.add_done_callback(lambda _: job.lease.give_back())
        else:
            job.lease.give_back()


def _same(before: MadeFrom, now: MadeFrom) -> bool:
    return len(before) == len(now) and all(
        p is q and made_as == other for (p, made_as), (q, other) in zip(before, now, strict=True)
    )
