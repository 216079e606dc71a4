"""Where one layer's weights rest: its states, and the way between them.

What the model holds is always what the state says. A layer whose weights rest in the computation placement
is *resident*: reading them and calling it cost nothing more than on a plain layer.
"""

import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from offload_layers._books import Borrower
from offload_layers._budget import Budget, Lease, budget_of
from offload_layers._counters import Counters
from offload_layers._device import device_of
from offload_layers._labels import label
from offload_layers._locking import CROSSINGS
from offload_layers._passing import Passing
from offload_layers._placement import Placement, Policy
from offload_layers._prefetch import Fetched
from offload_layers._schedule import Schedule
from offload_layers._shared import Lacking, SharedCopies
from offload_layers._source import Source, offered
from offload_layers._staged import StagedCopy
from offload_layers._state import State, check_legal
from offload_layers._tiers import TierStack
from offload_layers._views import Views
from offload_layers._weight import Slot, Weight

Result = TypeVar("Result")
HEIGHT = {State.OFFLOAD: 1, State.ONLOAD: 2, State.PREPARING: 3}
STATE = {height: state for state, height in HEIGHT.items()}


class Resting:
    """Owns one layer's weights and moves them between its placements.

    Args:
        name: Dotted name of the layer, for messages.
        weights: Its parameters, registered in the model in their OFFLOAD placement.
        buffers: The buffers that must be where the layer computes.
        policy: Where the weights are in each state.
        source: Where weights on disk are read from.
        limit: Bytes of the compute device that may be in use for this layer to become resident there.
        budget: The books of the compute device; by default those of this process.
        schedule: That of the model; None: the layer fetches when it is called, and knows no other layer.
    """

    def __init__(
        self,
        name: str,
        weights: list[Weight],
        buffers: list[Slot],
        policy: Policy,
        *,
        source: Source | None = None,
        limit: int | None = None,
        budget: Budget | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.name = name
        self.weights = weights
        self.buffers = buffers
        self._follow(policy)
        self.schedule = schedule
        self.source = source
        self.limit = limit
        self.resident = False
        self.is_open = False
        self.own_budget = budget
        self.counters = Counters()
        self._shared = SharedCopies() if schedule is None else schedule.shared
        self._lock = threading.RLock()
        self._users = 0  # those that compute with the weights, and those that read them from outside
        self._callers = 0  # only those that compute
        self._crossings = 0  # how often copies of the weights were made for one computation
        self._moves_at = CROSSINGS  # when the weights are moved to page-locked memory, if that is possible
        self._staged: StagedCopy | None = None
        self.keeps_staged = False  # a copy made for a computation is kept for the next one: it is small
        self._kept: Fetched | None = None
        self._beside: Lease | None = None
        self.holds_beside = False
        self._tiers = TierStack(weights, [w.registered for w in weights])
        if self._rests_on_device:
            self._device.synchronize()  # see Note [Any stream may compute]
        self._expose_if_resident()
        self._repeated = {w for w in weights if self._shared.holders(w.registered)}
        self._register_with_budget()
        for weight in weights:
            self._shared.join(self, weight.registered)

    @property
    def state(self) -> State:
        """Where the weights rest."""
        return STATE[self._tiers.height]

    @property
    def source(self) -> Source | None:
        """Where weights on disk are read from."""
        return self._source

    @source.setter
    def source(self, source: Source | None) -> None:
        self._source = source  # copies made from another one are not current any more: see ``at_rest``
        self._reader_source = source if self.schedule is None else self.schedule.source_for_reader(source)
        self._ask_source = offered(source, "prefetch")
        self._renew = offered(source, "renew")
        self._views: Views | None = None
        self._passing: Passing | None = None
        for weight in self.weights:
            weight.as_read = None

    @property
    def budget(self) -> Budget:
        """The books of the device on which the layer computes."""
        return self.own_budget if self.own_budget is not None else budget_of(self.policy.computation.device)

    @property
    def passes_from_disk(self) -> bool:
        """Whether the weights are read from disk whenever the layer does not stay."""
        return self.policy.onload.is_disk

    @property
    def beside_nbytes(self) -> int:
        """What computations of its model were seen to take of the device beside weights."""
        return 0 if self.schedule is None else self.schedule.beside.nbytes

    @property
    def last_called(self) -> int:
        """When a layer of this model was called last."""
        return sys.maxsize if self.schedule is None else self.schedule.last_called

    def _follow(self, policy: Policy) -> None:
        """Let *policy* say from now on where the weights are in each state."""
        self.policy = policy
        self._device = device_of(policy.computation.device)
        self._passing = None

    @property
    def _rests_on_device(self) -> bool:
        """Whether the device that computes has the weights at rest, be it in another dtype."""
        there = self.policy.computation.device
        return any(parameter.device == there for parameter in self._tiers.top)

    @property
    def leased_nbytes(self) -> int:
        """Bytes that the layer has borrowed from its budget."""
        staged = [copy.lease.nbytes for copy in (self._staged, self._kept) if copy is not None]
        beside = self._beside.nbytes if self._beside is not None else 0
        return self._tiers.leased_nbytes + sum(staged) + beside

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory in which the layer's weights wait, none if it computes with them there."""
        if self.policy.computation.device.type == "cpu" and self.resident:
            return 0
        return self._tiers.host_nbytes

    @property
    def between_calls(self) -> list[tuple[Weight, Tensor]]:
        """Each weight, and what holds it while the layer does not compute; on meta if it is on disk."""
        kept = self._kept
        return list(zip(self.weights, self._tiers.top if kept is None else kept.tensors, strict=True))

    # -- changing the state -------------------------------------------------------------------------

    def move_to(self, state: State) -> None:
        """Go to *state*, whatever it costs; on failure nothing has changed."""
        with self._lock:
            if state is self.state:
                return
            check_legal(self.state, state, layer=self.name)
            if HEIGHT[state] < self._tiers.height:
                self._drop_to(state)
            else:
                placement = self.policy[state]
                lacking, lease = self._lacking(placement), None
                if lacking is not None:
                    lease = self.budget.borrow(self, lacking.nbytes, limit=self.limit)
                self._push(placement, lacking, lease)

    def try_prepare(self, *, demotes: bool = True) -> bool:
        """Go from ONLOAD to PREPARING if its bytes fit under the limit; say whether it is there.

        With *demotes* others leave if the device turns out to have no memory for it.
        """
        with self._lock:
            if self.state is not State.ONLOAD:
                return self.state is State.PREPARING
            placement = self.policy.preparing
            lacking, lease = self._lacking(placement), None
            if lacking is not None:
                lease = self._borrow_to_stay(lacking.nbytes)
                if lease is None:
                    return False
            self._push(placement, lacking, lease, demotes=demotes)
            return True

    def try_demote(self) -> bool:
        """Go from PREPARING to ONLOAD if nobody computes with the layer now; say whether it was done."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            modules = self._modules()
            if modules is None:  # the model is garbage that was not collected yet
                self._drop_kept()
                self._tiers.abandon()
                self.hold_beside(0)
                return True
            if self._users:
                return False
            if self._kept is not None:
                self._drop_kept()
                return True
            if self.state is not State.PREPARING:
                return False
            self._drop_to(State.ONLOAD)
            return True
        finally:
            self._lock.release()

    def _modules(self) -> list[nn.Module] | None:
        """Return the modules that hold the weights, or None if one is garbage.

        Whoever is not called by the model itself keeps the list for as long as he uses the layer: another
        thread may drop the model meanwhile.
        """
        modules = [slot.alive for weight in self.weights for slot in weight.slots]
        alive = [module for module in modules if module is not None]
        return alive if len(alive) == len(modules) else None

    def is_idle(self, since: int) -> bool:
        """Say whether the model was really not called *since*; see `Schedule.is_idle`."""
        return self.schedule is None or self.schedule.is_idle(since)

    def yield_ahead_to(self, other: Borrower, *, waits: bool = True) -> None:
        """Drop what was fetched ahead for this layer's model, unless that is the model of *other*."""
        if self.schedule is not None and self.schedule is not getattr(other, "schedule", None):
            self.schedule.forget(waits=waits)

    def finish_dropped(self) -> None:
        """Wait until nothing is left of a fetch for this layer's model that was dropped and goes on."""
        if self.schedule is not None:
            self.schedule.prefetcher.finish_dropped()

    def drop_ahead(self) -> None:
        """Drop what was fetched ahead for this layer's own model, and wait until nothing is left of it."""
        if self.schedule is not None:
            self.schedule.forget()

    def climb_to(self, state: State) -> None:
        """Go up to *state* through the states between; PREPARING only if it fits."""
        with self._lock:
            if self.state is State.OFFLOAD and state is not State.OFFLOAD:
                self.move_to(State.ONLOAD)
            if state is State.PREPARING:
                self.try_prepare()

    def offload(self) -> None:
        """Go to OFFLOAD, and bring the buffers home."""
        if self.schedule is not None:
            self.schedule.let_go()
            self.schedule.forget()
        with self._lock:
            self._drop_kept()
            self.move_to(State.OFFLOAD)
            home = self.policy.offload.device
            if not self._users:
                self._move_buffers(torch.device("cpu") if home.type == "meta" else home)

    def obey_limit(self) -> None:
        """Have layers leave that the limit has no room for any more: one that is resident is not asked."""
        if self.limit is not None and not self.budget.keep_under(self.limit, self):
            self.try_demote()

    def hold_beside(self, nbytes: int) -> None:
        """Borrow bytes of the compute device for what belongs to the layer beside its weights."""
        if nbytes == (self._beside.nbytes if self._beside is not None else 0):
            return
        with self._lock:
            before, self._beside = self._beside, None
            if before is not None:
                before.give_back()
            self.holds_beside = nbytes > 0
            if nbytes:
                self._beside = self.budget.borrow(self, nbytes, limit=self.limit)

    # -- the mechanism ------------------------------------------------------------------------------

    def _register_with_budget(self) -> None:
        # a number, since the budget may ask when the model is gone; 0 if the layer computes where it rests
        computation = self.policy.computation
        moves = computation not in (self.policy.onload, self.policy.offload)
        self.computation_nbytes = sum(w.nbytes_in(computation) for w in self.weights) if moves else 0
        preparing = self.policy.preparing
        self.preparing_nbytes = self._new_nbytes(preparing)
        repeated = [w for w in self.weights if w in self._repeated and not preparing.holds(w.registered)]
        self.staying_nbytes = self.preparing_nbytes - sum(w.nbytes_in(preparing) for w in repeated)
        self.always_passes = preparing != computation
        self.budget.register(self)

    def _new_nbytes(self, placement: Placement) -> int:
        """Bytes of the compute device that going to *placement* takes."""
        if placement.device != self.policy.computation.device:
            return 0
        return sum(w.nbytes_in(placement) for w in self.weights if not placement.holds(w.registered))

    def _lacking(self, placement: Placement) -> Lacking | None:
        """Return what going to *placement* brings to the compute device; None if nothing."""
        if placement.device != self.policy.computation.device:
            return None
        coming = [weight for weight in self.weights if not placement.holds(weight.registered)]
        return self._shared.lacking(coming, placement, self.source) if coming else None

    def _push(
        self, placement: Placement, lacking: Lacking | None, lease: Lease | None, *, demotes: bool = True
    ) -> None:
        if not placement.is_disk:  # otherwise the model will hold what it holds
            self._drop_kept()
        self._hide()
        coming = [(w, w.registered) for w in self.weights if not placement.holds(w.registered)]
        source = self.source
        if self.schedule is not None and self._device.is_host:
            source = self.schedule.source_of_what_stays(source, self.limit)

        def push() -> None:
            self._tiers.push(
                placement,
                source,
                lease,
                computes_on=self.policy.computation.device,
                shared=self._shared,
            )

        try:
            with label("fetch", self.name):
                if demotes:
                    self._retrying(push)
                else:
                    push()
            if placement.device == self.policy.computation.device:
                self.counters.own_nbytes += sum(weight.nbytes_from(below) for weight, below in coming)
            if lacking is not None and lease is not None:
                for weight in lacking.weights:
                    if len(self._shared.holders(self._tiers.home(weight))) > 1:
                        its = self.budget.split(lease, weight.nbytes_in(placement))
                        self._shared.pay(weight.registered, its)
        except BaseException:
            if lease is not None:
                lease.give_back()
            raise
        finally:
            self._expose_if_resident()
        if self.resident and self.schedule is not None:
            self.schedule.prefetcher.drop_for(self)  # type: ignore[arg-type]  # a Residency

    def _retrying(self, attempt: Callable[[], Result], doing: str = "bringing the weights of") -> Result:
        """Run *attempt*, and if the device is full once more after others have left: `Budget.retrying`."""
        return self.budget.retrying(attempt, layer=self.name, doing=doing, make_room=self.make_room)

    def make_room(self) -> int:
        """Have all leave that can, since the device is full; return how many did."""
        self._was_full()
        return self.budget.make_room(self)

    def _was_full(self) -> None:
        if self.schedule is not None:
            self.schedule.was_full(self)

    def _drop_to(self, state: State) -> None:
        homes = list(self._tiers.homes)
        while self._tiers.height > HEIGHT[state]:
            is_on_device = self._rests_on_device
            self._hide()  # before the host waits: other threads go on
            if is_on_device:
                self._device.synchronize()
                for parameter in self._tiers.leaving:  # somebody may have read it, or autograd have saved it
                    self._device.record_use(parameter, by_anyone=True)
            self._tiers.pop()
        self._expose_if_resident()
        for home, kept in zip(homes, self._tiers.homes, strict=True):
            if kept is not home:
                self._pass_on(home, kept)

    def _pass_on(self, home: nn.Parameter, kept: nn.Parameter) -> None:
        """Give layers that have a weight on disk, too, what was written back of it."""
        for layer in self._shared.holders(home):
            if layer._lock.acquire(blocking=False):  # whoever has it may be about to pass something on to us
                try:
                    modules = layer._modules()
                    if modules is not None:
                        layer._tiers.follow(home, kept)
                        self._shared.join(layer, kept)
                finally:
                    layer._lock.release()

    def _expose_if_resident(self) -> None:
        placement = self.policy.computation
        self.resident = all(placement.holds(parameter) for parameter in self._tiers.top)
        if self.resident:
            for weight, parameter in zip(self.weights, self._tiers.top, strict=True):
                weight.expose(parameter)
            self._move_buffers(placement.device)

    def _hide(self) -> None:
        self.resident = False
        for weight in self.weights:
            weight.hide()

    def _borrow_to_stay(self, nbytes: int) -> Lease | None:
        """Borrow for becoming resident if there is room, or if this layer should stay rather than others."""
        lease = self.budget.try_borrow(self, nbytes, limit=self.limit)
        if lease is not None or self.schedule is None:
            return lease
        if self.schedule.displaces_idle(self):
            lease = self.budget.try_borrow(self, nbytes, limit=self.limit)
            if lease is not None:
                return lease
        for other in self.schedule.refused(self):
            if other.try_demote():
                lease = self.budget.try_borrow(self, nbytes, limit=self.limit)
                if lease is not None:
                    return lease
        return None

    def _drop_kept(self) -> None:
        kept, self._kept, self._views = self._kept, None, None
        if kept is not None:
            kept.lease.give_back()

    def _move_buffers(self, device: torch.device) -> None:
        for slot in self.buffers:
            buffer = slot.module._buffers[slot.name]
            if buffer is not None and buffer.device != device:
                if buffer.device == self.policy.computation.device:
                    self._device.synchronize()  # see Note [Any stream may compute]
                with torch.inference_mode(False):  # they outlive the forward that needs them there
                    slot.module._buffers[slot.name] = buffer.to(device)

    def __repr__(self) -> str:
        placement = self.policy[self.state]
        nbytes = sum(w.nbytes_in(placement) for w in self.weights)
        return f'<Residency "{self.name}" {self.state.name} {placement} {nbytes:,} bytes>'
