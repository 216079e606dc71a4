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

from offload_layers._changes import watch
from offload_layers._device import OutOfMemory
from offload_layers._fetching import Fetching
from offload_layers._locking import lock_pages
from offload_layers._prefetch import FOR_ONCE, Fetched
from offload_layers._resting import HEIGHT
from offload_layers._staged import StagedCopy, escaped
from offload_layers._state import State
from offload_layers._transfer import parameter_like
from offload_layers._uncompiled import uncompiled
from offload_layers._weight import Weight

_log = logging.getLogger("offload_layers.transfer")
Result = TypeVar("Result")


class Residency(Fetching):
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
        if calls and schedule is not None and self.limit is not None:
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
            beside = schedule.beside if schedule is not None and calls else None
            if beside is not None and limit is not None and beside.end(self, self.budget):
                self.budget.keep_under(limit, self)
            if not self._device.is_host:
                self._let_copies_pass()
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
            if not self._device.is_host and not torch.is_grad_enabled():  # otherwise that was done before
                for tensor in escaped(staged.fetched.tensors):
                    self._device.record_use(tensor)
            is_for_once = staged.fetched.made_from is FOR_ONCE or changed
            if self.keeps_staged and not (is_for_once or staged.is_differentiable or self.resident):
                self._kept = staged.fetched
                if self.budget.try_keep(staged.lease, limit=self.limit):
                    return
                self._kept = None
            staged.lease.give_back()
            if not (changed or self.resident or self._device.is_host):
                self._crossed()
            ties = [(weight, self.tied(weight)) for weight, _ in changed]
            for weight, values in changed:
                self.replace(weight, parameter_like(weight.registered, values))
        for weight, tied in ties:
            for layer, other in tied:
                layer.replace(other, weight.registered)

    def compute_again(self, forward: Callable[[], Result]) -> Result:
        """Run a forward once more that found the device full, after other layers have left it."""
        self.make_room()
        self.enter()
        self.drop_ahead()  # what was just ordered
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
                self._let_copies_pass()
                return weight.staged
            if weight.exposed is not None:  # the layer has become resident while this thread waited
                return weight.exposed
            copy = self._computable(weight, differentiable=self._wants_gradients())
            if self._device.reads_in_place(weight.registered):
                self._device.let_pass(self._device.mark())
            return copy

    # -- the mechanism ------------------------------------------------------------------------------

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

    def _crossed(self) -> None:
        """Count that the weights have crossed to the device; see ``_locking`` for what that leads to."""
        self._crossings += 1
        if self._crossings != self._moves_at:
            return
        self._moves_at *= 2  # for those that somebody else has now
        for weight, home in zip(self.weights, self._tiers.homes, strict=True):
            is_own = weight.registered is home and len(self._shared.holders(home)) == 1
            if is_own and not weight.was_moved:
                try:
                    weight.was_moved = lock_pages(home, self._device)
                except Exception:  # of a transform of torch's, say: nothing depends on it
                    _log.debug('"%s" stays where it is', weight.name, exc_info=True)

    def _let_copies_pass(self) -> None:
        """Wait until weights at rest have been read: see Note [Whoever has weights may change them]."""
        staged = self._staged
        if staged is not None and any(self._device.reads_in_place(w.registered) for w in self.weights):
            self._device.let_pass(staged.fetched.ready)

    def _record_use(self, fetched: Fetched) -> None:
        for tensor in fetched.tensors:
            self._device.record_use(tensor)
