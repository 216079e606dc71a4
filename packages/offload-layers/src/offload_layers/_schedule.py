"""What the layers of one model know of each other: their order, who is fetched next, and who should stay.

Note [Who stays is settled at once]
    If not all layers of a model can stay, nobody does in its first forward: only then is it known in which
    order they are called, and what computations take beside weights. All that should stay come at the
    beginning of the second, and nobody comes between two others that compute. So the limit holds from the
    first forward on, nothing is brought that would have to leave again, and what stays does not come to lie
    between activations, where it keeps the memory around it from being used as a whole. (On a CPU, a float32
    model of 2 GB of which half stays, 1,088 tokens: 260 MB more than weights and activations when layers came
    one by one.)
"""

import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

from offload_layers._beside import Beside
from offload_layers._books import Borrower
from offload_layers._budget import Budget
from offload_layers._changes import in_backward
from offload_layers._choice import Demand, adapt_residents, choose_residents
from offload_layers._device import OutOfMemory
from offload_layers._order import ExecutionOrder
from offload_layers._prefetch import Fetchable, Fetched, Prefetcher
from offload_layers._shared import SharedCopies
from offload_layers._source import Source, alone, owning

#: copies are kept between forwards, those of the smallest layers first, up to this part of the model's bytes:
#: norms, mostly, which cost more in calls than in bytes
KEPT_SHARE = 1 / 256
KEPT_NBYTES = 32 << 20  # but no more than that


#: for so long no more layers stay than fitted when the device had no memory left, below the limit: others may
#: have taken it, or the allocator's memory be in pieces
_FULL_ROUNDS = 16

_CLOCK = itertools.count(1)  # counts calls of layers in this process


class Staying(Borrower, Protocol):
    """A layer that may stay on the device."""

    resident: bool
    limit: int | None

    @property
    def passes_from_disk(self) -> bool:
        """Whether its weights are read from disk whenever it does not stay."""

    @property
    def budget(self) -> Budget:
        """The books of the device on which the layer computes."""


class Scheduled(Fetchable, Staying, Protocol):
    """A layer, as the schedule of its model sees it."""

    keeps_staged: bool

    def enter(self, work: float, calls: bool) -> None:
        """Stage the weights."""

    def leave(self, calls: bool) -> None:
        """End what ``enter`` began."""

    def make_lasting(self) -> None:
        """Make what the layer will compute with in each forward, as far as that is kept between forwards."""

    def come_to_stay(self) -> bool:
        """Become resident now, if that is possible without waiting for others; say whether it was done.

        Raises:
            OutOfMemory: the device has no memory for it.
        """


class Schedule:
    """The layers of one model in the order in which they are called.

    Args:
        beside_nbytes: What computations will take of the device beside weights, as far as that is known.

    Attributes:
        last_called: When a layer was called last, by a clock that counts such calls in this process. Layers
            that are resident are called without a question.
    """

    def __init__(self, beside_nbytes: int = 0) -> None:
        self._order: ExecutionOrder[Fetchable] = ExecutionOrder()
        self.prefetcher = Prefetcher(self._order)
        self.beside = Beside(beside_nbytes)
        self.shared = SharedCopies()
        self._all: list[weakref.ref[Scheduled]] = []
        self._has_lasting = False
        self._sources: list[tuple[Source | None, Source | None]] = []
        self._lock = threading.Lock()
        self._held: weakref.ref[Scheduled] | None = None
        self._work: dict[weakref.ref[Scheduled], float] = {}  # in the order in which layers were first called
        self._only_read: set[weakref.ref[Scheduled]] = set()  # of them those that were not called yet
        self._staying_nbytes = 0  # what all layers take when they stay
        self.last_called = 0
        self._called: dict[weakref.ref[Scheduled], int] = {}  # when each layer was called last
        self._round_began = 0  # when the layer that is called now was called the last time
        self._probed_at = self._probed_since = -1  # when it was last called, as it was asked: see `is_idle`
        self._displaced = 0  # when models that are idle were asked to leave
        self._is_complete = False  # no layer was new since one was called again
        self._is_short = False  # a layer was refused: not all can stay
        self._chosen: frozenset[weakref.ref[Scheduled]] = frozenset()
        self._chosen_for: tuple[int, int] = (-1, -1)  # for which room, and how many layers
        self._chosen_of = 0  # how many layers there were when it was last chosen anew
        self._full_at = 0  # what may stay after the device had no memory left
        self._full_rounds = 0  # for so many rounds
        self._settled = 0  # when it was decided who should stay
        self._settled_for: tuple[int | None, int] = (-1, -1)  # for which limit, and how many layers

    def take_in(self, layers: "Sequence[Scheduled]") -> None:
        """Learn of all *layers* of the model, in the order in which it holds them."""
        self._order.presume(layers)
        self._all = [weakref.ref(layer) for layer in layers]
        self._keep_small(layers)
        self._staying_nbytes = sum(layer.staying_nbytes for layer in layers)

    def called(self) -> "list[Scheduled]":
        """Return the layers that were called while they were not resident, the first one first."""
        return list(self._layers())

    # -- fetching ahead -----------------------------------------------------------------------------

    def saw(self, layer: Scheduled, work: float, *, calls: bool = True) -> None:
        """Learn that this thread calls *layer* now, for a computation of the size *work*.

        Without *calls* its weights are read from outside: then the call is yet to come, or never does. Nor is
        it a call of a new round if layers are run once more during a backward pass.
        """
        reference = weakref.ref(layer)
        self._order.saw(layer)
        self.last_called = next(_CLOCK)
        if not calls:
            if reference not in self._work:
                self._work[reference] = 0.0
                self._only_read.add(reference)
            return
        if in_backward():
            return
        self._is_complete = reference in self._work and reference not in self._only_read
        self._only_read.discard(reference)
        self._work[reference] = work
        self._round_began = self._called.get(reference, 0)
        self._called[reference] = self.last_called

    def take(self, layer: Fetchable) -> Fetched | None:
        """Return what was fetched ahead for *layer*, or None."""
        return self.prefetcher.take(layer)

    def start_after(self, layer: Scheduled) -> None:
        """Begin to fetch for the layers that follow *layer*."""
        self.prefetcher.start_after(layer)

    def forget(self, *, waits: bool = True) -> None:
        """Drop everything that was fetched ahead, with *waits* also what is being fetched now."""
        self.prefetcher.forget(waits=waits)

    def source_for_reader(self, source: Source | None) -> Source | None:
        """Return *source* as the reader thread should use it, one object for all layers that share it."""
        if getattr(source, "is_of_one_layer", False):
            return alone(source)
        for given, ours in self._sources:
            if given is source:
                return ours
        ours = alone(source)
        self._sources.append((source, ours))
        return ours

    def source_of_what_stays(self, source: Source | None, limit: int | None) -> Source | None:
        """Return what a layer is read from that stays in host memory, maybe while others pass through it.

        Then views of a mapped file would not stay: the pages of all layers are used in turn, and where memory
        is short the system takes those back first that were used longest ago. They would be read again with
        each forward, as if nothing stayed.
        """
        if source is None or limit is None or self._staying_nbytes <= limit:
            return source
        return owning(source)

    def make_lasting(self) -> None:
        """Have all layers make what lasts, once: see Note [What lasts is made at once] in ``_views``."""
        if self._has_lasting:
            return
        self._has_lasting = True
        for layer in self._every():
            layer.make_lasting()

    # -- reading weights from outside ---------------------------------------------------------------

    def hold(self, layer: Scheduled) -> None:
        """Keep *layer* staged until another layer is used: its weights are being read from outside."""
        held = self._held
        if held is not None and held() is layer:
            return
        layer.enter(0.0, False)
        with self._lock:
            before, self._held = self._held, weakref.ref(layer)
        self._leave(before)

    def let_go(self, *, but: Scheduled | None = None) -> None:
        """End what ``hold`` began, unless it is *but* that is held."""
        if self._held is None:
            return
        with self._lock:
            if self._held is None or (but is not None and self._held() is but):
                return
            before, self._held = self._held, None
        self._leave(before)

    @staticmethod
    def _leave(held: "weakref.ref[Scheduled] | None") -> None:
        layer = None if held is None else held()
        if layer is not None:
            layer.leave(False)

    # -- staying ------------------------------------------------------------------------------------

    @staticmethod
    def _keep_small(layers: Sequence[Scheduled]) -> None:
        """Let the smallest of all *layers* of a model keep the copies that they compute with."""
        left = min(KEPT_NBYTES, KEPT_SHARE * sum(layer.computation_nbytes for layer in layers))
        for layer in sorted(layers, key=lambda layer: layer.computation_nbytes):
            left -= layer.computation_nbytes
            layer.keeps_staged = left >= 0

    def has_room_for(self, layer: Staying) -> bool:
        """Say whether *layer* may stay by itself: all can, as far as is known, or it takes nothing."""
        if layer.limit is None or not layer.staying_nbytes:
            return True
        return not self._is_short and self._staying_nbytes <= layer.limit

    def settle(self, layer: Staying) -> bool:
        """Decide who should stay, now that *layer* is called, and have them come; at most once a round.

        A round is the time between two calls of a layer.

        Returns:
            Whether anybody came: see Note [Who stays is settled at once].
        """
        limit, layers = layer.limit, len(self._work)
        if limit is None or not self._is_complete or in_backward():
            return False
        before = self._settled_for
        if before == (limit, layers) and self._round_began < self._settled:
            return False
        self._settled_for, self._settled = (limit, layers), self.last_called
        self.displaces_idle(layer)
        room = layer.budget.room(self.called(), limit=limit)
        if before[0] != limit:
            self._full_rounds = 0
        elif self._full_rounds:
            self._full_rounds -= 1
            room = min(room, self._full_at)
        # some layers are called several times in a first forward: what they see of it is chosen for once
        is_known = before[1] == layers and self._chosen_of != layers
        is_anew = before[0] != limit or is_known
        if is_anew or self._chosen_for != (room, layers):
            self._choose(room, is_anew=is_anew)
        return self._come()

    def _come(self) -> bool:
        """Have those come who were chosen; say whether anybody did. Others leave if the device was full."""
        came = False
        for layer in self._layers():
            if weakref.ref(layer) in self._chosen:
                try:
                    came |= layer.come_to_stay()
                except OutOfMemory:
                    self.was_full(layer)
                    break
            elif self._full_rounds and layer.resident:
                layer.try_demote()
        return came

    def was_full(self, layer: Staying) -> None:
        """Take note that the device had no memory left for what *layer* needed, below the limit.

        For some rounds no more layers stay than there were, less what was needed, and in this round nobody
        comes any more.
        """
        staying = sum(other.staying_nbytes for other in self._layers() if other.resident)
        self._full_at = max(0, staying - layer.computation_nbytes)
        self._full_rounds = _FULL_ROUNDS
        self._settled_for, self._settled = (layer.limit, len(self._work)), next(_CLOCK)

    def refused(self, layer: Staying) -> Iterator[Staying]:
        """Take note that the limit left no room for *layer*; yield those that should leave for it."""
        self._is_short = True
        if weakref.ref(layer) in self._chosen:
            for other in self._layers():
                if weakref.ref(other) not in self._chosen:
                    yield other

    def displaces_idle(self, layer: Staying) -> bool:
        """Have models leave that were not called in the last round of this one, for which there is no room.

        They are asked once a round.

        Returns:
            Whether there is more room now.
        """
        since = self._round_began
        if layer.limit is None or since <= self._displaced:
            return False
        self._displaced = self.last_called
        lacking = sum(other.staying_nbytes for other in self.called() if not other.resident)
        nbytes = lacking + self.prefetcher.window
        return layer.budget.displace_idle(layer, nbytes, limit=layer.limit, since=since)

    def is_idle(self, since: int) -> bool:
        """Say whether no layer was called *since*, a time of another model's clock, as far as can be told.

        Layers that are resident are called without a question. So if all of them are, the smallest one leaves
        first. If it is not called until somebody asks once more, in a later round, the model is idle.
        """
        if self.last_called >= since:
            return False
        layers = list(self._layers()) or [layer for layer in self._every() if layer.resident]
        if not layers:
            return True
        if not all(layer.resident for layer in layers):
            if self._probed_at != self.last_called:
                return True  # some layer always tells
            return self._probed_since != since
        self._probed_at, self._probed_since = self.last_called, since
        min(layers, key=lambda layer: layer.staying_nbytes).try_demote()
        return False

    def _choose(self, room: int, *, is_anew: bool) -> None:
        """Choose those who should stay: with as few changes as can be, unless *is_anew*.

        How much room there is differs a little from round to round, where others use the device.
        """
        layers, window = list(self._layers()), self.prefetcher.window
        demands = [
            Demand(layer.staying_nbytes, self._work[weakref.ref(layer)], layer.passes_from_disk)
            for layer in layers
        ]
        if is_anew:
            chosen = choose_residents(demands, room=room, window=window)
            self._chosen_of = len(layers)
        else:
            before = {index for index, layer in enumerate(layers) if weakref.ref(layer) in self._chosen}
            chosen = adapt_residents(before, demands, room=room, window=window)
        self._chosen = frozenset(weakref.ref(layers[index]) for index in chosen)
        self._chosen_for = room, len(layers)

    def _every(self) -> Iterator[Scheduled]:
        """Yield all layers of the model, whether they were called or not."""
        for reference in self._all:
            layer = reference()
            if layer is not None:
                yield layer

    def _layers(self) -> Iterator[Scheduled]:
        """Yield the layers that were called or read while they were not resident."""
        for reference in list(self._work):
            layer = reference()
            if layer is not None:
                yield layer
