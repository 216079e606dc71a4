"""Fetching the weights of the layers that come next while this one computes.

Each thread that runs the model has a queue of fetches ahead of it: at most two of the largest layers, and no
more than the budget of the compute device allows. Where a source can bring weights closer by itself, and the
device computes on the same cores, it is told of more than that, and nothing is fetched. The queue is filled
again when half of it is used up, so that the reader wakes rarely. What was fetched is used only if the
layer's weights are still the ones that were there when the fetch began.

In its first forward the order of a model is only presumed. Then too sources are told, and nothing is fetched.
Where much was told of layers that are not called, as of a mixture of experts, nothing is presumed any more.

What a source was told of long before may have left the page cache again: while the model rested, or because
memory is short. So it is told again of the layers that come next, of as many as would be fetched.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from time import perf_counter
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from offload_layers._budget import Lease
from offload_layers._changes import Noted
from offload_layers._counters import Counters
from offload_layers._device import Mark
from offload_layers._labels import label
from offload_layers._order import ExecutionOrder, Place
from offload_layers._reader import Job, Reader
from offload_layers._source import Source

MadeFrom = tuple[Source | None, list[tuple[nn.Parameter, Noted]]]
FOR_ONCE: MadeFrom = None, []  #: of copies that are not to be used for another computation

#: of the largest layer: how much is fetched ahead
LARGEST_AHEAD = 2
#: bytes that a source is told of beforehand, at least. They come to the page cache, which gives them up when
#: the system needs memory; so the disk can go on while layers compute that need none of it
ASKED_AHEAD = 512 << 20


class Fetchable(Protocol):
    """A layer, as its prefetcher sees it."""

    name: str
    counters: Counters

    @property
    def staging_nbytes(self) -> int:
        """Bytes that a staged copy of the weights takes now; 0 if the layer needs none."""

    @property
    def asking_nbytes(self) -> int:
        """Bytes of which its source should be told before the layer is called; 0 if there are none."""

    @property
    def only_asks_ahead(self) -> bool:
        """Whether the layer fetches by itself in any case, and its source should only be told beforehand."""

    def ask_ahead(self) -> None:
        """Tell the source that the weights will be read soon."""

    def lease_ahead(self) -> Lease | None:
        """Borrow the bytes of a staged copy, or return None if they do not fit beside what is there."""

    def at_rest(self) -> MadeFrom:
        """Return what a staged copy is made from: the source, and the parameters as they are now."""

    def fetch(self) -> "tuple[list[Tensor], Mark]":
        """Return the weights in the computation placement, without gradients; called on another thread."""


class Fetched(NamedTuple):
    """Weights to compute with.

    Attributes:
        tensors: One for each weight, in the computation placement.
        lease: The bytes borrowed for them.
        made_from: What they are copies of.
        ready: The computation has to wait for it; see ``Device.wait``.
    """

    tensors: list[Tensor]
    lease: Lease
    made_from: MadeFrom
    ready: Mark = None

    def is_current(self, layer: Fetchable) -> bool:
        """Whether *layer* still has the weights that these are copies of."""
        source, parameters = self.made_from
        its_source, its_parameters = layer.at_rest()
        return (
            source is its_source
            and len(parameters) == len(its_parameters)
            and all(
                parameter is its_own and version == its_version
                for (parameter, version), (its_own, its_version) in zip(
                    parameters, its_parameters, strict=True
                )
            )
        )


class _Ahead(NamedTuple):
    """A fetch that was ordered; without a job, its source was only told that it will be asked.

    Attributes:
        layer: For which.
        place: Where it is called in the order of execution.
        job: What fetches.
        nbytes: Bytes that are fetched.
    """

    layer: "weakref.ref[Fetchable]"
    place: "Place[Fetchable]"
    job: Job[Fetched] | None
    nbytes: int


class _Queue:
    """The fetches ahead of one thread, in the order in which the layers will be called.

    Attributes:
        ordered: The fetches.
        places: Where their layers will be called.
        nbytes: Bytes of all.
        near: How many at the head were looked at when they had come near, or were ordered then.
        near_nbytes: Bytes of those.
        presumed: Bytes of layers that were presumed to be called, and have not been yet.
        end: Where the next fetch will follow.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.ordered: deque[_Ahead] = deque()
        self.places: dict[weakref.ref[Fetchable], Place[Fetchable]] = {}
        self.nbytes = self.near = self.near_nbytes = 0
        self.presumed: dict[weakref.ref[Fetchable], int] = {}
        self.end: Place[Fetchable] | None = None

    def take_out(self, layer: Fetchable) -> _Ahead | None:
        """Take out the fetch for *layer*, if there is one."""
        reference = weakref.ref(layer)
        if reference not in self.places:
            return None
        position = 0
        while self.ordered[position].layer != reference:
            position += 1
        return self._take(position)

    def drop(self, layer: Fetchable) -> None:
        """Drop the fetch for *layer*, if there is one."""
        ahead = self.take_out(layer)
        if ahead is not None:
            self._drop(ahead)

    def drop_before(self, layer: Fetchable) -> None:
        """Drop what should have been used before *layer*, or everything if nothing is ahead for it."""
        reference = weakref.ref(layer)
        if reference not in self.places:
            self.clear()
            return
        while self.ordered[0].layer != reference:
            self._drop(self._take(0))

    def add(self, ahead: _Ahead) -> None:
        """Order a fetch."""
        self.ordered.append(ahead)
        self.places[ahead.layer] = ahead.place
        self.nbytes += ahead.nbytes
        if ahead.job is not None:
            self.reader.submit(ahead.job)

    def come_near(self, window: int) -> Iterator[_Ahead]:
        """Yield the fetches that have come into the first *window* bytes since this was asked last."""
        while self.near < len(self.ordered):
            ahead = self.ordered[self.near]
            if self.near_nbytes + ahead.nbytes > window:
                return
            self.near += 1
            self.near_nbytes += ahead.nbytes
            yield ahead

    def pass_over(self, window: int) -> None:
        """Take no further note of those that are in the first *window* bytes now."""
        for _ in self.come_near(window):
            pass

    def clear(self) -> None:
        """Drop everything. A queue whose thread has ended need not be cleared: its leases are garbage too."""
        self.end = None
        while self.ordered:
            self._drop(self._take(len(self.ordered) - 1))

    def _take(self, position: int) -> _Ahead:
        ahead = self.ordered[position]
        del self.ordered[position]
        del self.places[ahead.layer]
        self.nbytes -= ahead.nbytes
        if position < self.near:
            self.near -= 1
            self.near_nbytes -= ahead.nbytes
        return ahead

    def _drop(self, ahead: _Ahead) -> None:
        if ahead.job is not None:
            self.reader.drop(ahead.job)


class Prefetcher:
    """Fetches ahead for the layers of one model."""

    def __init__(self, order: ExecutionOrder[Fetchable]) -> None:
        self._order = order
        self._reader = Reader()
        self._lock = threading.RLock()
        self._local = threading.local()
        self._queues: weakref.WeakSet[_Queue] = weakref.WeakSet()
        self._largest = 0

    @property
    def window(self) -> int:
        """Bytes that may be fetched ahead of one thread."""
        return LARGEST_AHEAD * self._largest

    def take(self, layer: Fetchable) -> Fetched | None:
        """Return what was fetched for *layer*, which this thread calls now, waiting if it is on its way."""
        with self._lock:
            self._largest = max(self._largest, layer.staging_nbytes)
            queue, reference = self._queue(), weakref.ref(layer)
            first = queue.ordered[0].layer if queue.ordered else reference
            if first != reference and not self._is_next(first):
                queue.drop_before(layer)  # the model goes another way
            queue.presumed.pop(reference, None)
            ahead = queue.take_out(layer)
            if ahead is None or ahead.job is None:
                return None
        is_ready = ahead.job.is_done
        fetched = self._reader.result(ahead.job) if is_ready else self._await(layer, ahead.job)
        if fetched is None or not fetched.is_current(layer):
            self._reader.drop(ahead.job)
            return None
        if is_ready:
            layer.counters.hits += 1
        else:
            layer.counters.waits += 1
        return fetched

    def start_after(self, layer: Fetchable) -> None:
        """Order fetches for the layers that follow *layer*, as far as the bound allows."""
        queue, order = self._queue(), self._order
        window = near = self.window
        if layer.only_asks_ahead or order.following(order.place) is None:
            self._ask_again(queue, near)
            window = max(window, ASKED_AHEAD)
        if 2 * queue.nbytes > window:
            return
        with self._lock:
            start = queue.end if queue.ordered and queue.end is not None else order.place
            place, steps = start, 0
            while steps <= order.count:
                seen = found = order.following(place)
                if found is None and sum(queue.presumed.values()) <= 2 * ASKED_AHEAD:
                    found = order.presumed(place)
                if found is None:
                    break
                following, place = found
                reference, steps = weakref.ref(following), steps + 1
                expected = queue.places.get(reference)
                if place in (start, expected):  # all the way round
                    break
                nbytes = following.asking_nbytes if seen is None else following.staging_nbytes
                if not nbytes or following is layer or expected is not None:
                    continue
                if queue.ordered and queue.nbytes + nbytes > window:
                    break
                if following.only_asks_ahead or seen is None:
                    following.ask_ahead()
                    ahead = _Ahead(reference, place, None, nbytes)
                    if seen is None:
                        queue.presumed[reference] = nbytes
                else:
                    lease = following.lease_ahead()
                    if lease is None:
                        break
                    ahead = self._ahead(following, place, nbytes, lease)
                queue.add(ahead)
                queue.end = place
            queue.pass_over(near)  # they were asked for just now

    def drop_for(self, layer: Fetchable) -> None:
        """Drop what was fetched ahead for *layer*, which has no need of it any more."""
        with self._lock:
            for queue in list(self._queues):
                queue.drop(layer)

    def forget(self, *, waits: bool = True) -> None:
        """Drop everything that was fetched ahead.

        Args:
            waits: For what is being fetched now, and for other threads. Two models that make each other
                forget from within a fetch would wait for ever.
        """
        if not self._lock.acquire(blocking=waits):
            return  # it is not idle
        try:
            for queue in list(self._queues):
                queue.clear()
        finally:
            self._lock.release()
        if waits:
            self._reader.finish_running()

    def finish_dropped(self) -> None:
        """Wait until nothing is left of a fetch that goes on although it was dropped."""
        self._reader.finish_running(only_dropped=True)

    def ahead_nbytes(self) -> int:
        """Return the bytes that are borrowed for what is ahead of this thread."""
        return self._queue().nbytes

    def settle(self) -> None:
        """Wait until the reader has nothing to do."""
        self._reader.settle()

    def _ask_again(self, queue: _Queue, window: int) -> None:
        """Tell the sources of the layers that have come into the first *window* bytes."""
        with self._lock:
            for ahead in queue.come_near(window):
                following = ahead.layer()
                if following is not None:
                    following.ask_ahead()

    def _await(self, layer: Fetchable, job: Job[Fetched]) -> Fetched | None:
        begin = perf_counter()
        with label("wait for", layer.name):
            fetched = self._reader.result(job)
        layer.counters.waited_s += perf_counter() - begin
        return fetched

    def _queue(self) -> _Queue:
        queue: _Queue | None = getattr(self._local, "queue", None)
        if queue is None:
            queue = self._local.queue = _Queue(self._reader)
            self._queues.add(queue)
        return queue

    def _is_next(self, expected: "weakref.ref[Fetchable]") -> bool:
        """Whether the first layer which will need a fetch is the *expected* one."""
        for steps, following in enumerate(self._order.upcoming()):
            if following.staging_nbytes or steps > self._order.count:
                return weakref.ref(following) == expected
        return False

    @staticmethod
    def _ahead(layer: Fetchable, place: "Place[Fetchable]", nbytes: int, lease: Lease) -> _Ahead:
        reference = weakref.ref(layer)
        made_from = layer.at_rest()  # noted before the fetch begins: see Fetched.is_current

        def fetch() -> Fetched | None:
            alive = reference()
            if alive is None:
                return None
            tensors, ready = alive.fetch()
            return Fetched(tensors, lease, made_from, ready)

        return _Ahead(reference, place, Job(fetch, lease.give_back), nbytes)
