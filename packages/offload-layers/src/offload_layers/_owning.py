"""The values of one layer's weights, wherever they rest: read, replaced, and given back to a plain model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from offload_layers._device import device_of
from offload_layers._errors import IllegalTransitionError
from offload_layers._locking import unlock_pages
from offload_layers._placement import Placement, Policy
from offload_layers._resting import STATE, Resting
from offload_layers._state import State
from offload_layers._weight import Weight


class Owning(Resting):
    """Owns the values of one layer's weights."""

    @contextmanager
    def at_home(self) -> Iterator[list[nn.Parameter]]:
        """Let the model hold the values of OFFLOAD, unexposed, in the block; then go back to this state."""
        with self._lock:
            state = self.state
            self._drop_to(State.OFFLOAD)
            self._hide()
            self._device.synchronize()  # copies of these values may be under way
            try:
                yield self._tiers.top
            finally:
                self._device.synchronize()  # see Note [Any stream may compute]
                self._expose_if_resident()
                self.climb_to(state)

    def value(self, weight: Weight) -> Tensor:
        """Return a weight's values at rest, in the dtype in which they are kept."""
        with self._lock:
            return self._tiers.values(weight, self.source)

    def origin(self, weight: Weight) -> tuple[Tensor, list[Placement]]:
        """Return a weight's values at rest, and the placements that they pass to be computed with."""
        with self._lock:
            values, height = self._tiers.origin(weight, self.source, counted=True)
            passed = [self.policy[STATE[h]] for h in range(height + 1, self._tiers.height + 1)]
        return values, [*(p for p in passed if not p.is_disk), self.policy.computation]

    def tied(self, weight: Weight) -> "list[tuple[Owning, Weight]]":
        """Return the weights of other layers that are the same parameter as *weight*."""
        home = self._tiers.home(weight)
        others: list[Owning] = [layer for layer in self._shared.holders(home) if layer is not self]
        return [
            (layer, other)
            for layer in others
            for other, its_home in zip(layer.weights, layer._tiers.homes, strict=True)
            if its_home is home
        ]

    def replace(self, weight: Weight, parameter: nn.Parameter) -> None:
        """Take *parameter* as the new values of a weight; one on disk is in host memory from now on."""
        with self.at_home():
            self.settle(weight, parameter)

    def rebase(self, weight: Weight, make: Callable[[nn.Parameter], nn.Parameter]) -> None:
        """Let *make* turn the values at rest of a weight into others; on failure nothing has changed."""
        with self.at_home():
            self.settle(weight, make(weight.registered))

    def forget(self, weight: Weight, module: nn.Module) -> None:
        """Stop managing *weight* as a parameter of *module*."""
        with self._lock:
            weight.slots = [slot for slot in weight.slots if slot.module is not module]
            if not weight.slots:
                self._tiers.forget(weight)
                self.weights.remove(weight)

    def settle(self, weight: Weight, parameter: nn.Parameter) -> None:
        """Make *parameter* the values at rest of *weight*: in the OFFLOAD placement, or on the host."""
        if parameter is not self._tiers.home(weight):
            weight.was_moved = False
        weight.register(parameter)
        with torch.inference_mode(False):  # they outlive the forward, if there is one
            if not self.policy.offload.is_disk:
                parameter = weight.copy_to(self.policy.offload, self.source)
            elif not parameter.is_meta:
                parameter = weight.copy_to(Placement(torch.device("cpu")), self.source)
        self._tiers.set_home(weight, parameter)
        self._shared.join(self, parameter)

    def set_policy(self, policy: Policy) -> None:
        """Follow *policy* from now on; the weights go where their state then demands."""
        with self._lock:
            if policy == self.policy:
                return
            self._drop_kept()
            with self.at_home():
                if not policy.offload.is_disk:
                    self._tiers.rehome(
                        [
                            self._shared.of(
                                w,
                                policy.offload,
                                self.source,
                                lambda w: w.copy_to(policy.offload, self.source),
                            )
                            for w in self.weights
                        ]
                    )
                self._follow(policy)
                self._register_with_budget()

    def release(self, placement: Placement | None, plain: dict[nn.Parameter, nn.Parameter]) -> None:
        """Let the model hold its values as ordinary parameters, then end.

        Args:
            placement: Where they go; None: where they rest, and what is on disk comes to host memory.
            plain: Parameters at rest -> what was made of them, for those that layers share.
        """
        if self.schedule is not None:
            self.schedule.let_go()
            self.schedule.forget()
        with self._lock:
            if self._users:
                raise IllegalTransitionError(f'layer "{self.name}" is computing and cannot be given back now')
            self._drop_kept()
            self.hold_beside(0)
            self._drop_to(State.OFFLOAD)
            for weight in self.weights:
                home = weight.registered
                if home not in plain:
                    there = torch.device("cpu") if home.is_meta else home.device
                    plain[home] = weight.copy_to(placement or Placement(there), self.source)
                    if weight.was_moved and plain[home] is home:
                        unlock_pages(plain[home])
            parameters = [plain[weight.registered] for weight in self.weights]
            self._hide()
            self._tiers.rehome(parameters)
            if placement is not None:
                self._move_buffers(placement.device)
                device_of(placement.device).synchronize()  # see Note [Any stream may compute]
