"""The time during which one layer computes.

Unless the layer is resident, ``enter`` stages copies of its weights for as long as ``forward`` runs. Threads
and nested calls share one staged copy; the last one to leave drops it.
"""

import logging
from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from offload_layers._budget import Lease
from offload_layers._changes import fingerprint, watch
from offload_layers._device import Mark, OutOfMemory
from offload_layers._idle_workers import let_idle_workers_sleep
from offload_layers._labels import is_profiling, label
from offload_layers._owning import Owning
from offload_layers._passing import Passing
from offload_layers._prefetch import Fetched, MadeFrom
from offload_layers._resting import HEIGHT
from offload_layers._source import Source, offered
from offload_layers._staged import StagedCopy
from offload_layers._state import State
from offload_layers._transfer import parameter_like
from offload_layers._uncompiled import uncompiled
from offload_layers._views import Views
from offload_layers._weight import Weight

_log = logging.getLogger("offload_layers.transfer")
Result = TypeVar("Result")

#: bytes of a layer from which on a source reads on several threads. A small layer is read before they wake up
_READ_IN_THREADS = 4 << 20


class Residency(Owning):
    """Owns one layer's weights; lets the layer compute with them wherever they rest."""

    # -- computing ----------------------------------------------------------------------------------

    @uncompiled
    def enter(self, work: float = 0.0, calls: bool = True) -> None:
        """Make the weights readable in the computation placement until ``leave``.

        Args:
            work: Size of the computation to come, in any unit that is the same for all layers of a model.
            calls: Whether the layer itself computes. Others have to ask ``read`` for each weight: they may
                be in any stream.
        """
        schedule = self.schedule
        if schedule is not None:
            schedule.let_go(but=self)
            schedule.saw(self, work, calls=calls)
        self._device.computes_here()
        with self._lock:
            if self.buffers:
                self._move_buffers(self.policy.computation.device)
            if self._tiers.height < HEIGHT[State.PREPARING]:
                self._climb()
            if not self.resident:
                if schedule is not None and self._device.is_host:
                    schedule.make_lasting()
                self._stage(differentiable=self._wants_gradients())
                if schedule is not None:
                    schedule.start_after(self)
            self._users += 1
            if calls:
                self._callers += 1
                for weight in self.weights:
                    staged = weight.staged
                    if staged is not None:
                        weight.expose(staged)
        if schedule is not None and self.limit is not None:
            try:
                schedule.beside.begin(self, self.budget)
            except BaseException:  # of a driver
                self._leave(calls)
                raise

    @uncompiled
    def leave(self, calls: bool = True) -> None:
        """End what ``enter`` began."""
        schedule, limit = self.schedule, self.limit
        try:
            if schedule is not None and limit is not None and schedule.beside.end(self, self.budget):
                self.budget.keep_under(limit, self)
        finally:
            self._leave(calls)

    def _leave(self, calls: bool) -> None:
        with self._lock:
            self._users -= 1
            self._callers -= calls
            staged = self._staged
            if staged is None:
                return
            self._device.finished()  # each of several users may have a queue of his own
            if staged.is_differentiable:
                self._record_use(staged.fetched)
            if self._users:
                if not self._callers and not self.resident:
                    for weight in self.weights:
                        weight.conceal()
                return
            changed = staged.changed(self.weights, self._computable)
            if not self.resident:
                self._hide()
            self._staged = None
            if self.keeps_staged and not (changed or staged.is_differentiable or self.resident):
                self._kept = staged.fetched
                if self.budget.try_keep(staged.lease, limit=self.limit):
                    return
                self._kept = None
            staged.lease.give_back()
            ties = [(weight, self.tied(weight)) for weight, _ in changed]
            for weight, values in changed:
                self.replace(weight, parameter_like(weight.registered, values))
        for weight, tied in ties:
            for layer, other in tied:
                layer.replace(other, weight.registered)

    def compute_again(self, forward: Callable[[], Result]) -> Result:
        """Run a forward once more that found the device full, after other layers have left it."""
        self._was_full()
        self.budget.demote_all()
        self.enter()
        try:
            return self._retrying(forward, doing="running")
        finally:
            self.leave()

    @uncompiled
    def read(self, weight: Weight) -> Tensor:
        """Return one weight as the layer would compute with it, for code that reads it from outside.

        Such code often asks for a dtype first, then for the weight, then calls the layer. So the layer
        stays staged until another one is used.
        """
        if self.is_open:
            return weight.held
        if self.schedule is not None:
            self.schedule.hold(self)
        with self._lock:
            if self._staged is not None and weight.staged is not None:
                watch(weight.staged)
                self._device.wait(self._staged.fetched.ready)
                self._device.record_use(weight.staged)
                return weight.staged
            if weight.exposed is not None:  # the layer has become resident while this thread waited
                return weight.exposed
            return self._computable(weight, differentiable=self._wants_gradients())

    # -- being fetched ahead: read by the prefetcher without this layer's lock -----------------------

    @property
    def staging_nbytes(self) -> int:
        """Bytes that a staged copy takes now; 0 if the layer needs none or would be changed by it."""
        if self.resident or self._staged is not None or self._kept is not None or self._tiers.height == 1:
            return 0
        return self._passes().copy_nbytes

    @property
    def asking_nbytes(self) -> int:
        """Bytes of which the source should be told before the layer is called; 0 if there are none."""
        if self.resident or self._staged is not None or self._kept is not None or self._ask_source is None:
            return 0
        passing = self._passes()
        return passing.copy_nbytes if passing.on_disk else 0

    @property
    def only_asks_ahead(self) -> bool:
        """Whether the source can bring weights closer by itself, and more would disturb the computation."""
        return self._ask_source is not None and not self._device.overlaps

    def ask_ahead(self) -> None:
        """Tell the source that the weights on disk will be read soon."""
        names = self._passes().on_disk
        if names and self._ask_source is not None:
            self._ask_source(names)

    def lease_ahead(self) -> Lease | None:
        """Borrow the bytes of a staged copy, or return None if they do not fit beside what is there."""
        lease = self.budget.borrow_ahead(self, self.staging_nbytes, limit=self.limit)
        if lease is None and self.schedule is not None and self.schedule.displaces_idle(self):
            lease = self.budget.borrow_ahead(self, self.staging_nbytes, limit=self.limit)
        if lease is not None and self._passes().rests_on_device:
            self._device.finished()  # see Note [Weights that rest on the device]
        return lease

    def at_rest(self) -> MadeFrom:
        """Return what a staged copy is made from: the source, and the parameters with their fingerprints."""
        at_rest = [weight.registered for weight in self.weights]
        return self._source, [(parameter, fingerprint(parameter)) for parameter in at_rest]

    def fetch(self) -> tuple[list[Tensor], Mark]:
        """Return the weights in the computation placement, without gradients, and when they will be there."""
        self.ask_ahead()
        try:
            fetched = self._fetch_aside(self._reader_source)
        except OutOfMemory:
            self._was_full()
            raise
        self.counters.ahead_nbytes += self._passes().moving_nbytes
        return fetched

    # -- the mechanism ------------------------------------------------------------------------------

    def _computable(self, weight: Weight, *, differentiable: bool = False) -> Tensor:
        return weight.computable(self.policy.computation, self.source, differentiable=differentiable)

    def _climb(self) -> None:
        """Rest as near to the computation as the limit allows."""
        begin, version, schedule = perf_counter(), self._tiers.version, self.schedule
        if self.state is State.OFFLOAD:
            self.move_to(State.ONLOAD)
        others_came = False
        if schedule is None or schedule.has_room_for(self):
            self.try_prepare()
        else:
            others_came = schedule.settle(self)
        if others_came or self._tiers.version != version:
            self.counters.waited_s += perf_counter() - begin
            if self.resident:  # otherwise what is staged then is counted
                self.counters.misses += 1

    def come_to_stay(self) -> bool:
        """Become resident now, if there is room and nobody uses the layer; say whether it was done.

        What fails now is tried again in the next forward; until then the layer passes.

        Raises:
            OutOfMemory: the device has no memory for it. Nobody else left.
        """
        if self._tiers.height == HEIGHT[State.PREPARING] or not self._lock.acquire(blocking=False):
            return False
        try:
            if self._staged is not None:
                return False
            if self.state is State.OFFLOAD:
                self.move_to(State.ONLOAD)
            return self.try_prepare(demotes=False)
        except OutOfMemory:
            self.budget.release_cached()
            raise
        except Exception as error:
            _log.warning('"%s" could not be brought to stay, and passes: %s', self.name, error)
            return False
        finally:
            self._lock.release()

    def _stage(self, *, differentiable: bool) -> None:
        """Let the model hold copies for a computation, unless it does already."""
        before = self._staged
        if before is not None and (before.is_differentiable or not differentiable):
            fetched = before.fetched
            self._device.wait(fetched.ready)  # made by a thread whose queue may be another one
        else:
            ahead = self._take_detached() if differentiable else self._take_fetched()
            fetched = ahead or self._fetch_now(None if before is None else before.lease, differentiable)
            self._device.wait(fetched.ready)
            if before is not None:  # others compute, and have not waited for this one
                self._device.synchronize()
            self._staged = StagedCopy.show(
                self.weights, fetched, differentiable=differentiable, replaced=before
            )
        if torch.is_grad_enabled():  # autograd may save them for the backward pass
            self._record_use(fetched)

    def _record_use(self, fetched: Fetched) -> None:
        for tensor in fetched.tensors:
            self._device.record_use(tensor)

    def _take_detached(self) -> Fetched | None:
        """Return such copies for autograd to save, unless gradients are to flow through to what rests."""
        at_rest = [weight.registered for weight in self.weights]
        if any(parameter.requires_grad and not parameter.is_meta for parameter in at_rest):
            return None
        fetched = self._take_fetched()
        if fetched is None:
            return None
        if any(tensor.is_inference() for tensor in fetched.tensors):  # which autograd cannot save
            fetched.lease.give_back()
            return None
        for tensor in fetched.tensors:
            if tensor.requires_grad:
                tensor.requires_grad_(False)
        return fetched

    def _take_fetched(self) -> Fetched | None:
        """Return the copies that were kept, or fetched ahead."""
        kept, self._kept = self._kept, None
        if kept is not None:
            if kept.is_current(self):
                self.counters.hits += 1
                return kept
            kept.lease.give_back()
        return self.schedule.take(self) if self.schedule is not None else None

    def _fetch_now(self, lease: Lease | None, differentiable: bool) -> Fetched:
        """Make copies for the computation to come, paid for by *lease* if there is one already."""
        begin = perf_counter()
        borrowed = lease or self.budget.borrow(self, self._passes().copy_nbytes, limit=self.limit)
        try:
            fetched = self._retrying(
                lambda: self._differentiable(borrowed) if differentiable else self._copies(borrowed)
            )
        except BaseException:
            if lease is None:
                borrowed.give_back()
            raise
        counters = self.counters
        counters.misses += 1
        counters.own_nbytes += self._passes().moving_nbytes
        counters.waited_s += perf_counter() - begin
        return fetched

    def _differentiable(self, lease: Lease) -> Fetched:
        """Return copies through which gradients flow, made in the queue that computes."""
        made_from = self.at_rest()
        tensors = [self._computable(weight, differentiable=True) for weight in self.weights]
        return Fetched(tensors, lease, made_from, self._device.mark())

    def _copies(self, lease: Lease) -> Fetched:
        """Return copies without gradients, or the views that were kept."""
        views, passing = self._views, self._passes()
        if views is not None and views.version == passing.version and views.renew():
            return Fetched(views.tensors, lease, views.made_from)
        made_from = self.at_rest()
        if passing.rests_on_device:
            self._device.finished()  # see Note [Weights that rest on the device]
        tensors, ready = self._fetch_aside(self.source)
        self._views = self._lent(tensors, made_from) if passing.may_be_views else None
        passing.may_be_views = self._views is not None
        if self._views is None and self._reads_in_threads(passing):
            let_idle_workers_sleep()
        return Fetched(tensors, lease, made_from, ready)

    def make_lasting(self) -> None:
        """Make what the layer will compute with in each forward: copies that it keeps, or views.

        Nothing that will not be kept is read. What fails now is tried again when the layer is called.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self.resident or self._staged is not None or self._kept is not None:
                return
            if self.keeps_staged and self.policy.onload.is_disk and self.policy.preparing.is_disk:
                self._keep()
            elif self._will_be_views():
                made_from = self.at_rest()
                tensors, _ = self._fetch_aside(self.source)
                self._views = self._lent(tensors, made_from)
        except Exception:
            _log.debug('"%s" will be fetched when it is called', self.name, exc_info=True)
        finally:
            self._lock.release()

    def _keep(self) -> None:
        """Make copies and keep them, if there is room."""
        begin, passing = perf_counter(), self._passes()
        lease = self.budget.borrow_ahead(self, passing.copy_nbytes, limit=self.limit)
        if lease is None:
            return
        try:
            if not self.budget.try_keep(lease, limit=self.limit):
                lease.give_back()
                return
            self._kept = self._copies(lease)
        except BaseException:
            lease.give_back()
            raise
        self.counters.own_nbytes += passing.moving_nbytes
        self.counters.waited_s += perf_counter() - begin

    def _will_be_views(self) -> bool:
        """Whether all weights will be views of the source's memory, as far as it tells without reading."""
        passing, computation, source = self._passes(), self.policy.computation, self.source
        if not passing.may_be_views or len(passing.on_disk) < len(self.weights):
            return False
        if self._renew is None or offered(source, "info") is None:
            return False
        stored = [weight.on_disk(source)[0] for weight in self.weights]
        return all(computation.dtype_for(dtype) == dtype for dtype in stored) and self._renew(passing.on_disk)

    def _reads_in_threads(self, passing: Passing) -> bool:
        """Whether several threads read the weights, on the cores that compute."""
        if self._device.overlaps or self._reader_source is self._source or not passing.on_disk:
            return False
        return passing.moving_nbytes >= _READ_IN_THREADS

    def _lent(self, tensors: list[Tensor], made_from: MadeFrom) -> Views | None:
        """Return what may be kept of *tensors*, which were just fetched: see ``_views``."""
        if self._renew is None or not all(w.is_as_read_in(self.policy.computation) for w in self.weights):
            return None
        views = Views(self.weights, tensors, made_from, self._tiers.version, self._renew)
        return views if views.renew() else None

    def _fetch_aside(self, source: Source | None) -> tuple[list[Tensor], Mark]:
        """Copy in the device's second queue: also the computation's own thread is ahead of the device."""
        if is_profiling():
            with label("fetch", self.name):
                return self._copy_aside(source)
        return self._copy_aside(source)

    def _copy_aside(self, source: Source | None) -> tuple[list[Tensor], Mark]:
        device, placement = self._device, self.policy.computation
        with device.aside(), torch.inference_mode(False):  # others may compute with them later
            tensors = [w.computable(placement, source, differentiable=False) for w in self.weights]
            return tensors, device.mark()

    def _passes(self) -> Passing:
        """Return what it takes to make staged copies of what the layer has at rest now."""
        passing, version = self._passing, self._tiers.version
        if passing is None or passing.version != version:
            passing = self._passing = Passing(self.weights, self.policy.computation, version)
        return passing

    def _wants_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(w.registered.requires_grad for w in self.weights)
