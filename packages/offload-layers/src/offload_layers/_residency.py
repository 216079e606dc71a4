"""The life of one layer's weights: the only code that registers them, stages them or frees them.

Note [A stack of tiers]
A layer at rest in OFFLOAD holds its *home*: host tensors, or nothing but shapes when it is on disk. Going
to ONLOAD and PREPARING puts another copy on top, made from the one below; where both placements are equal
it is the same tensors and costs nothing. Going back drops the copy on top. So nothing is ever copied
*down*, a value cannot lose precision on the way, and offloading is free.

What is registered in the model is always the top of the stack. An in-place change of a copy (an
optimizer, ``weight.data.add_``) would be lost with it; torch counts in-place changes of a tensor, so a
changed copy is written back before it is dropped.

Note [Who reads what]
While the top of the stack is in the computation placement the layer is *resident*: reading its weights
and calling it cost nothing more than on a plain layer. Otherwise ``enter`` stages copies for as long as
``forward`` runs. Threads and nested calls share one staged copy; the last one to leave drops it.
"""

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._budget import Budget, Lease, budget_of
from offload_layers._placement import Placement, Policy
from offload_layers._source import Source
from offload_layers._state import State, check_legal
from offload_layers._transfer import parameter_like
from offload_layers._weight import Slot, Weight

_HEIGHT = {State.OFFLOAD: 1, State.ONLOAD: 2, State.PREPARING: 3}
_STATE = {height: state for state, height in _HEIGHT.items()}


@dataclass
class _Tier:
    """What one state holds: the layer's parameters in one placement."""

    parameters: list[nn.Parameter]
    lease: Lease | None = None
    versions: list[int] = field(default_factory=list)  # in-place changes counted when the copy was made


def _version(parameter: nn.Parameter) -> int:
    """How often the parameter was changed in place; tensors made under inference mode do not count."""
    return 0 if parameter.is_inference() else parameter._version


class Residency:
    """Owns one layer's weights and moves them between its placements.

    Args:
        name: Dotted name of the layer, for messages.
        weights: Its parameters, registered in the model in their OFFLOAD placement.
        buffers: Module and name of each buffer that must be where the layer computes.
        policy: Where the weights are in each state.
        source: Where weights on disk are read from.
        limit: Bytes of the compute device that may be in use for this layer to become resident there.
        budget: The books of the compute device; by default those of this process.
    """

    def __init__(
        self,
        name: str,
        weights: list[Weight],
        buffers: list[tuple[nn.Module, str]],
        policy: Policy,
        *,
        source: Source | None = None,
        limit: int | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.name = name
        self.weights = weights
        self.buffers = buffers
        self.policy = policy
        self.source = source
        self.limit = limit
        self.resident = False
        self.is_open = False
        self._budget = budget
        self._lock = threading.RLock()
        self._users = 0
        self._staged: Lease | None = None
        self._staged_differentiable = False
        self._tiers = [_Tier([w.registered for w in weights])]
        self._expose_if_resident()
        self.budget.register(self)

    @property
    def state(self) -> State:
        """Where the weights rest."""
        return _STATE[len(self._tiers)]

    @property
    def budget(self) -> Budget:
        """The books of the device on which the layer computes."""
        return self._budget if self._budget is not None else budget_of(self.policy.computation.device)

    @property
    def computation_nbytes(self) -> int:
        """Bytes that a staged copy takes; 0 for a layer that computes where it rests."""
        if self.policy.computation in (self.policy.onload, self.policy.offload):
            return 0
        return sum(w.nbytes_in(self.policy.computation) for w in self.weights)

    # -- changing the state -------------------------------------------------------------------------

    def move_to(self, state: State) -> None:
        """Go to *state*, whatever it costs; on failure nothing has changed."""
        with self._lock:
            if state is self.state:
                return
            check_legal(self.state, state, layer=self.name)
            if _HEIGHT[state] < len(self._tiers):
                self._drop_to(state)
            else:
                placement = self.policy[state]
                lease = None
                if nbytes := self._new_nbytes(placement):
                    lease = self.budget.borrow(self, nbytes, limit=self.limit)
                self._push(placement, lease)

    def try_prepare(self) -> bool:
        """Go from ONLOAD to PREPARING if its bytes fit under the limit; say whether it is there."""
        with self._lock:
            if self.state is not State.ONLOAD:
                return self.state is State.PREPARING
            placement = self.policy.preparing
            lease = None
            if nbytes := self._new_nbytes(placement):
                lease = self.budget.try_borrow(self, nbytes, limit=self.limit)
                if lease is None:
                    return False
            self._push(placement, lease)
            return True

    def try_demote(self) -> bool:
        """Go from PREPARING to ONLOAD if nobody computes with the layer now; say whether it was done."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self.state is not State.PREPARING or self._users:
                return False
            self._drop_to(State.ONLOAD)
            return True
        finally:
            self._lock.release()

    def set_policy(self, policy: Policy) -> None:
        """Follow *policy* from now on; the weights go where their state then demands."""
        with self._lock:
            if policy == self.policy:
                return
            state = self.state
            self._drop_to(State.OFFLOAD)
            try:
                home = self._tiers[0].parameters
                if not policy.offload.is_disk:
                    home = [w.copy_to(policy.offload, self.source) for w in self.weights]
                self._hide()
                self._register(home)
                self._tiers, self.policy = [_Tier(home)], policy
                self.budget.register(self)
            finally:
                self._expose_if_resident()
                self.climb_to(state)

    def climb_to(self, state: State) -> None:
        """Go up to *state* through the states between; PREPARING only if it fits."""
        with self._lock:
            if self.state is State.OFFLOAD and state is not State.OFFLOAD:
                self.move_to(State.ONLOAD)
            if state is State.PREPARING:
                self.try_prepare()

    def offload(self) -> None:
        """Go to OFFLOAD, and bring the buffers home."""
        with self._lock:
            self.move_to(State.OFFLOAD)
            home = self.policy.offload.device
            if not self._users:
                self._move_buffers(torch.device("cpu") if home.type == "meta" else home)

    # -- computing ----------------------------------------------------------------------------------

    def enter(self) -> None:
        """Make the weights readable in the computation placement until ``leave``."""
        with self._lock:
            self._move_buffers(self.policy.computation.device)
            if self.state is State.OFFLOAD:
                self.move_to(State.ONLOAD)
            if self.state is State.ONLOAD:
                self.try_prepare()
            if not self.resident:
                differentiable = self._wants_gradients()
                if self._staged is None or (differentiable and not self._staged_differentiable):
                    self._stage(differentiable)
            self._users += 1

    def leave(self) -> None:
        """End what ``enter`` began."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._unstage()

    def read(self, weight: Weight) -> Tensor:
        """Return one weight as the layer would compute with it, for code that reads it from outside."""
        with self._lock:
            slot = weight.slots[0]
            exposed = slot.module.__dict__.get(slot.attribute)
            if exposed is not None:  # another thread staged it while this one waited
                return exposed  # type: ignore[no-any-return]
            placement = self.policy.computation
            return weight.computable(placement, self.source, differentiable=self._wants_gradients())

    # -- values -------------------------------------------------------------------------------------

    def value(self, weight: Weight) -> Tensor:
        """Return a weight's values at rest, in the dtype in which they are kept."""
        with self._lock:
            home = self._tiers[0].parameters[self.weights.index(weight)]
            top = weight.registered
            if self._changed(weight, top):
                return top
            return weight._read(self.source) if home.is_meta else home

    def replace(self, weight: Weight, parameter: nn.Parameter) -> None:
        """Take *parameter* as the new values of a weight; a weight on disk is in host memory from now on."""
        with self._lock:
            state = self.state
            self._drop_to(State.OFFLOAD)
            self._hide()
            weight.register(parameter)
            self._settle(weight)
            self._expose_if_resident()
            self.climb_to(state)

    @contextmanager
    def opened(self, weights: Iterable[Weight], *, read: bool = False) -> Iterator[None]:
        """Let the model hold host tensors at rest for *weights*, to be read or overwritten in the block.

        What was overwritten or assigned is taken over; the others are as before, on disk if they were.

        Args:
            weights: Some of this layer's weights.
            read: Fill in the values of weights on disk; otherwise those are uninitialised.
        """
        with self._lock:
            state = self.state
            self._drop_to(State.OFFLOAD)
            self._hide()
            lent: list[tuple[Weight, nn.Parameter, nn.Parameter, int]] = []
            for weight in weights:
                home = weight.registered
                if home.is_meta:
                    values = weight._read(self.source) if read else torch.empty(home.shape, dtype=home.dtype)
                    weight.register(parameter_like(home, values))
                lent.append((weight, home, weight.registered, _version(weight.registered)))
            self.is_open = True
            try:
                yield
            finally:
                self.is_open = False
                for weight, home, parameter, version in lent:
                    now = weight.slots[0].module._parameters[weight.slots[0].attribute]
                    if now is None or (now is parameter and _version(now) == version):
                        now = home
                    weight.register(now)
                    self._settle(weight)
                self._expose_if_resident()
                self.climb_to(state)

    def forget(self, weight: Weight, module: nn.Module) -> None:
        """Stop managing *weight* as a parameter of *module*."""
        with self._lock:
            weight.slots = [slot for slot in weight.slots if slot.module is not module]
            if not weight.slots:
                index = self.weights.index(weight)
                del self.weights[index]
                for tier in self._tiers:
                    del tier.parameters[index : index + 1], tier.versions[index : index + 1]

    # -- the mechanism ------------------------------------------------------------------------------

    def _settle(self, weight: Weight) -> None:
        """Make what the model holds of *weight* its values at rest, in the OFFLOAD placement."""
        if not self.policy.offload.is_disk:
            weight.register(weight.copy_to(self.policy.offload, self.source))
        self._tiers[0].parameters[self.weights.index(weight)] = weight.registered

    def _new_nbytes(self, placement: Placement) -> int:
        """Bytes of the compute device that going to *placement* takes."""
        if placement.device != self.policy.computation.device:
            return 0
        return sum(w.nbytes_in(placement) for w in self.weights if not placement.holds(w.registered))

    def _push(self, placement: Placement, lease: Lease | None) -> None:
        try:
            if placement.is_disk:
                parameters = [w.registered for w in self.weights]
            else:
                with torch.inference_mode(False):  # the copies outlive the forward that caused them
                    parameters = [w.copy_to(placement, self.source) for w in self.weights]
        except BaseException:
            if lease is not None:
                lease.give_back()
            raise
        self._register(parameters)
        self._tiers.append(_Tier(parameters, lease, [_version(p) for p in parameters]))
        self._expose_if_resident()

    def _drop_to(self, state: State) -> None:
        while len(self._tiers) > _HEIGHT[state]:
            tier = self._tiers[-1]
            self._write_back(tier)
            self._tiers.pop()
            self._hide()
            self._register(self._tiers[-1].parameters)
            if tier.lease is not None:
                tier.lease.give_back()
        self._expose_if_resident()

    def _write_back(self, tier: _Tier) -> None:
        """Keep what was changed in the copy on top: its values in the tensors below, and its gradient."""
        for i, (parameter, version) in enumerate(zip(tier.parameters, tier.versions, strict=True)):
            below = self._tiers[-2].parameters[i]
            if parameter is below:
                continue
            if _version(parameter) != version:
                device = torch.device("cpu") if below.is_meta else below.device
                values = parameter.detach().to(device, below.dtype, copy=True)
                if below.is_meta:  # from now on these values are at home in host memory
                    kept = parameter_like(below, values)
                    for lower in self._tiers[:-1]:
                        lower.parameters[i] = kept if lower.parameters[i] is below else lower.parameters[i]
                else:
                    below.data.copy_(values)
            if parameter.grad is not None and not below.is_meta:
                below.grad = parameter.grad.to(below.device, below.dtype)

    def _changed(self, weight: Weight, top: nn.Parameter) -> bool:
        tier = self._tiers[-1]
        return bool(tier.versions) and _version(top) != tier.versions[self.weights.index(weight)]

    def _register(self, parameters: list[nn.Parameter]) -> None:
        for weight, parameter in zip(self.weights, parameters, strict=True):
            trains = weight.registered.requires_grad  # requires_grad_() reaches what is registered only
            weight.register(parameter)
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)

    def _expose_if_resident(self) -> None:
        placement = self.policy.computation
        parameters = self._tiers[-1].parameters
        self.resident = all(placement.holds(p) for p in parameters)
        if self.resident:
            for weight, parameter in zip(self.weights, parameters, strict=True):
                weight.expose(parameter)
            self._move_buffers(placement.device)

    def _hide(self) -> None:
        self.resident = False
        for weight in self.weights:
            weight.hide()

    def _stage(self, differentiable: bool) -> None:
        placement = self.policy.computation
        nbytes = self._new_nbytes(placement)
        lease = self._staged or self.budget.borrow(self, nbytes, limit=self.limit)
        try:
            staged = [
                w.computable(placement, self.source, differentiable=differentiable) for w in self.weights
            ]
        except BaseException:
            if self._staged is None:
                lease.give_back()
            raise
        for weight, tensor in zip(self.weights, staged, strict=True):
            weight.stage(tensor)
        self._staged, self._staged_differentiable = lease, differentiable

    def _unstage(self) -> None:
        if self._staged is None:
            return
        if not self.resident:
            self._hide()
        self._staged.give_back()
        self._staged = None

    def _wants_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(w.registered.requires_grad for w in self.weights)

    def _move_buffers(self, device: torch.device) -> None:
        for module, name in self.buffers:
            buffer = module._buffers[name]
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)

    # -- copies of the model ------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> "Residency":
        """Return the residency of a copied model: own values at rest, the same source and budget."""
        with self._lock:
            new = Residency.__new__(Residency)
            memo[id(self)] = new
            new.__dict__.update(self.__dict__)
            new._lock = threading.RLock()
            new._users, new._staged, new.resident = 0, None, False
            new.weights = [Weight(weight.name, []) for weight in self.weights]
            memo.update({id(old): weight for old, weight in zip(self.weights, new.weights, strict=True)})
            for old, weight in zip(self.weights, new.weights, strict=True):
                weight.slots = [Slot(copy.deepcopy(s.module, memo), s.attribute) for s in old.slots]
            new.buffers = copy.deepcopy(self.buffers, memo)
            new._tiers = [_Tier(copy.deepcopy(self._tiers[0].parameters, memo))]
            for weight, parameter in zip(new.weights, new._tiers[0].parameters, strict=True):
                weight.register(parameter)
            new._expose_if_resident()
            new.budget.register(new)
            new.climb_to(State.ONLOAD if self.state is not State.OFFLOAD else State.OFFLOAD)
            return new

    def __repr__(self) -> str:
        placement = self.policy[self.state]
        nbytes = sum(w.nbytes_in(placement) for w in self.weights)
        return f'<Residency "{self.name}" {self.state.name} {placement} {nbytes:,} bytes>'
