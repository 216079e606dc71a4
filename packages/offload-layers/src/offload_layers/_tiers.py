"""The copies that a layer holds of its weights: a stack with the values at rest at its bottom.

A layer in OFFLOAD has one tier, its *home*: host tensors, or nothing but shapes when it is on disk. Going
to ONLOAD and to PREPARING puts a tier on top, made from the one below; where both placements are equal it
is the same tensors and costs nothing. Going back drops the top. So nothing is ever copied down, no value
loses precision on the way, and offloading is free.

What the model holds at rest is the top of the stack. An in-place change of a copy (an optimizer,
``weight.add_``) would be dropped with it; torch counts a tensor's in-place changes, so a changed copy is
written back to the tiers below first.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from offload_layers._budget import Lease
from offload_layers._changes import Fingerprint, checksum, fingerprint
from offload_layers._device import device_of
from offload_layers._packed import nbytes
from offload_layers._placement import Placement
from offload_layers._shared import SharedCopies
from offload_layers._source import Source
from offload_layers._transfer import parameter_like
from offload_layers._weight import Weight


@dataclass
class _Tier:
    parameters: list[nn.Parameter]
    lease: Lease | None = None
    made_as: list[Fingerprint] = field(default_factory=list)  # when the copies were made
    sums: list[Tensor | None] = field(default_factory=list)  # of their values then; None: not a copy

    def is_changed(self, index: int, *, counted: bool = False) -> bool:
        """Say whether a copy has other values than it was made with; *counted*: that torch has counted."""
        copy, made_with = self.parameters[index], self.sums[index]
        if fingerprint(copy) != self.made_as[index]:
            return True
        if counted:
            return False
        now = None if made_with is None else checksum(copy)
        return now is not None and made_with is not None and bool(now != made_with)


class TierStack:
    """The tiers of one layer. Registers what is on top; exposes nothing."""

    def __init__(self, weights: list[Weight], home: list[nn.Parameter]) -> None:
        self._weights = weights
        self._tiers = [_Tier(home)]
        self.version = 0  # counts the changes of what is registered

    @property
    def height(self) -> int:
        """1 in OFFLOAD, 2 in ONLOAD, 3 in PREPARING."""
        return len(self._tiers)

    @property
    def top(self) -> list[nn.Parameter]:
        """What the model holds at rest."""
        return self._tiers[-1].parameters

    @property
    def leaving(self) -> list[nn.Parameter]:
        """What the next `pop` drops: copies that are on top only."""
        below = {id(parameter) for parameter in self._tiers[-2].parameters}
        return [parameter for parameter in self.top if id(parameter) not in below]

    @property
    def leased_nbytes(self) -> int:
        """Bytes of the compute device that the copies take."""
        return sum(tier.lease.nbytes for tier in self._tiers if tier.lease is not None)

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory in which weights wait; what the books of the device have is not among them."""
        there = [p for tier in self._tiers if tier.lease is None for p in tier.parameters]
        waiting = {id(p): p for p in there if p.device.type == "cpu"}
        return sum(nbytes(parameter) for parameter in waiting.values())

    def push(
        self,
        placement: Placement,
        source: Source | None,
        lease: Lease | None,
        *,
        computes_on: torch.device,
        shared: SharedCopies,
    ) -> None:
        """Put copies in *placement*, paid for by *lease*, on top; on failure nothing has changed."""

        def make(weight: Weight) -> nn.Parameter:
            copy = weight.copy_to(placement, source)
            if placement.device.type == "cpu" and computes_on.type != "cpu":
                return self._locked(copy, weight.registered, computes_on)
            return copy

        sums: list[Tensor | None] = [None] * len(self._weights)
        if placement.is_disk:
            parameters = self.top
        else:
            with torch.inference_mode(False):  # the copies outlive the forward that caused them
                parameters = [shared.of(weight, placement, source, make) for weight in self._weights]
                below = self.top
                sums = [None if p is q else checksum(p) for p, q in zip(parameters, below, strict=True)]
            if placement.device == computes_on:
                device_of(computes_on).synchronize()  # see Note [Any stream may compute]
            self._register(parameters)
        made_as = [fingerprint(parameter) for parameter in parameters]
        self._tiers.append(_Tier(list(parameters), lease, made_as, sums))

    @staticmethod
    def _locked(copy: nn.Parameter, below: nn.Parameter, device: torch.device) -> nn.Parameter:
        """Return a copy that waits in host memory in memory from which it crosses fastest."""
        if copy is below:  # no copy was made
            return copy
        there = device_of(device).lock(copy)
        return copy if there is copy else parameter_like(copy, there)

    def pop(self) -> None:
        """Drop the copies on top, keeping what was changed in them."""
        tier = self._tiers[-1]
        with torch.inference_mode(False):  # what is written outlives the forward that has the layer leave
            self._write_back(tier)
        self._tiers.pop()
        self._register(self.top)
        if tier.lease is not None:
            tier.lease.give_back()

    def rehome(self, home: list[nn.Parameter]) -> None:
        """Replace the values at rest while they are all there is."""
        assert self.height == 1
        self._register(home)
        self._tiers = [_Tier(home)]

    @property
    def homes(self) -> list[nn.Parameter]:
        """What each weight has at the bottom of the stack."""
        return self._tiers[0].parameters

    def home(self, weight: Weight) -> nn.Parameter:
        """Return the values at rest of one weight, or its shape if it is on disk."""
        return self.homes[self._weights.index(weight)]

    def set_home(self, weight: Weight, parameter: nn.Parameter) -> None:
        """Replace the values at rest of one weight while they are all there is."""
        assert self.height == 1
        self.version += 1
        weight.register(parameter)
        self._tiers[0].parameters[self._weights.index(weight)] = parameter

    def values(self, weight: Weight, source: Source | None) -> Tensor:
        """Return a weight's values at rest, in the dtype in which they are kept."""
        return self.origin(weight, source)[0]

    def origin(self, weight: Weight, source: Source | None, *, counted: bool = False) -> tuple[Tensor, int]:
        """Return a weight's values at rest, and the height of the tier that holds them.

        With *counted* a copy has changed only if torch has counted a change; then one whose memory was
        damaged is not taken for one that was changed.
        """
        index = self._weights.index(weight)
        for height in range(self.height, 1, -1):  # a copy above one that was changed has the change too
            tier = self._tiers[height - 1]
            copy = tier.parameters[index]
            if tier.is_changed(index, counted=counted) and weight.keeps_change_of(copy):
                return copy, height
        home = self._tiers[0].parameters[index]
        return weight.read(source) if home.is_meta else home, 1

    def follow(self, home: nn.Parameter, kept: nn.Parameter) -> None:
        """Have *kept* wherever there was nothing but *home*, a weight on disk."""
        self.version += 1
        for tier in self._tiers:
            tier.parameters[:] = [kept if parameter is home else parameter for parameter in tier.parameters]
        for weight in self._weights:
            if weight.registered is home:
                weight.rest_on(kept)

    def forget(self, weight: Weight) -> None:
        """Drop one weight from all tiers."""
        self.version += 1
        index = self._weights.index(weight)
        for tier in self._tiers:
            del tier.parameters[index : index + 1], tier.made_as[index : index + 1]
            del tier.sums[index : index + 1]

    def abandon(self) -> None:
        """Give all borrowed bytes back and drop all copies; nothing is left to be used."""
        while len(self._tiers) > 1:
            tier = self._tiers.pop()
            if tier.lease is not None:
                tier.lease.give_back()

    def _register(self, parameters: list[nn.Parameter]) -> None:
        self.version += 1
        for weight, parameter in zip(self._weights, parameters, strict=True):
            trains = weight.registered.requires_grad  # requires_grad_() reaches what is registered only
            weight.register(parameter)
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)

    def _write_back(self, tier: _Tier) -> None:
        for i, parameter in enumerate(tier.parameters):
            below = self._tiers[-2].parameters[i]
            if parameter is below:
                continue
            if tier.is_changed(i) and self._weights[i].keeps_change_of(parameter):
                device = torch.device("cpu") if below.is_meta else below.device
                values = parameter.detach().to(device, below.dtype, copy=True)
                if below.is_meta:  # from now on these values are at home in host memory
                    kept = parameter_like(below, values)
                    for lower in self._tiers[:-1]:
                        lower.parameters[i] = kept if lower.parameters[i] is below else lower.parameters[i]
                else:
                    with torch.no_grad():
                        below.copy_(values)  # counted as a change of that copy, which is passed on in turn
            if parameter.grad is not None and not below.is_meta:
                below.grad = parameter.grad.to(below.device, below.dtype)
