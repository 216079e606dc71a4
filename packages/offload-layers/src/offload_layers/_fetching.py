"""The copies with which a layer computes: made when it is called or ahead of that, and kept if that pays."""

import logging
from time import perf_counter

import torch
from torch import Tensor

from offload_layers._budget import Lease
from offload_layers._changes import noted
from offload_layers._device import Mark, OutOfMemory
from offload_layers._idle_workers import let_idle_workers_sleep
from offload_layers._labels import is_profiling, label
from offload_layers._owning import Owning
from offload_layers._passing import Passing
from offload_layers._prefetch import FOR_ONCE, Fetched, MadeFrom
from offload_layers._source import Source, offered
from offload_layers._views import Views
from offload_layers._weight import Weight

_log = logging.getLogger("offload_layers.transfer")

#: bytes of a layer from which on a source reads on several threads. A small layer is read before they wake up
_READ_IN_THREADS = 4 << 20


class Fetching(Owning):
    """Makes copies of one layer's weights, wherever they rest."""

    # -- being fetched ahead: read by the prefetcher without this layer's lock -----------------------

    @property
    def staging_nbytes(self) -> int:
        """Bytes that a staged copy takes now; 0 if the layer needs none ahead or would be changed by it."""
        if self.resident or self._staged is not None or self._kept is not None or self._tiers.height == 1:
            return 0
        passing = self._passes()
        return 0 if passing.changes_unseen else passing.copy_nbytes

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
        return lease

    def at_rest(self) -> MadeFrom:
        """Return what a staged copy is made from: the source, and the parameters as they are now."""
        at_rest = [weight.registered for weight in self.weights]
        return self._source, [(parameter, noted(parameter)) for parameter in at_rest]

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

    # -- making copies ------------------------------------------------------------------------------

    def _computable(self, weight: Weight, *, differentiable: bool = False) -> Tensor:
        return weight.computable(self.policy.computation, self.source, differentiable=differentiable)

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
        tensors = [self._computable(weight, differentiable=True) for weight in self.weights]
        return Fetched(tensors, lease, FOR_ONCE, self._device.mark())

    def _copies(self, lease: Lease) -> Fetched:
        """Return copies without gradients, or the views that were kept."""
        views, passing = self._views, self._passes()
        if views is not None and views.version == passing.version and views.renew():
            return Fetched(views.tensors, lease, views.made_from)
        keeps = self.keeps_staged and not passing.changes_unseen
        made_from = self.at_rest() if keeps or passing.may_be_views else FOR_ONCE
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
