"""The copies of a layer's weights that live while the layer computes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor

from offload_layers._budget import Lease
from offload_layers._changes import Fingerprint, data_was_taken, fingerprint
from offload_layers._prefetch import Fetched
from offload_layers._weight import Weight


def escaped(tensors: list[Tensor]) -> list[Tensor]:
    """Return those of *tensors* that are referred to elsewhere, or whose memory is: what a layer returns."""
    return [tensors[index] for index, counts in enumerate(_counts(tensors)) if counts != _usual()]


def _counts(tensors: list[Any]) -> list[tuple[int, ...]]:
    """Return how often each tensor and its memory are referred to."""
    of_storage: Any = getattr(torch._C, "_storage_Use_Count", lambda _: 0)
    return [
        (getrefcount(tensor), tensor._use_count(), of_storage(tensor.untyped_storage()._cdata))
        for tensor in tensors
    ]


@functools.cache
def _usual() -> tuple[int, ...]:
    """Return the counts of what is in a list only."""
    return _counts([torch.nn.Parameter(torch.empty(1, device="cpu"), requires_grad=False)])[0]


@dataclass
class StagedCopy:
    """What the model holds during a computation, in place of what it holds at rest.

    Attributes:
        fetched: The copies, and the bytes borrowed for them.
        is_differentiable: Whether gradients flow through it to the parameters at rest.
        replaced: Shown before it, and still in use by those who began to compute then.
    """

    fetched: Fetched
    is_differentiable: bool
    replaced: "StagedCopy | None"
    _made_as: list[Fingerprint]

    @property
    def lease(self) -> Lease:
        """The bytes borrowed for the copies."""
        return self.fetched.lease

    @classmethod
    def show(
        cls,
        weights: list[Weight],
        fetched: Fetched,
        *,
        differentiable: bool,
        replaced: "StagedCopy | None" = None,
    ) -> "StagedCopy":
        """Let the model hold the tensors of *fetched*."""
        for weight, tensor in zip(weights, fetched.tensors, strict=True):
            weight.stage(tensor)
        return cls(fetched, differentiable, replaced, [fingerprint(tensor) for tensor in fetched.tensors])

    def changed(
        self, weights: list[Weight], fresh: Callable[[Weight], Tensor]
    ) -> list[tuple[Weight, Tensor]]:
        """Return the weights whose copies somebody has changed in place, with their new values.

        Args:
            weights: Those of `show`.
            fresh: Makes a copy of a weight anew, to compare with where torch has not counted.
        """
        changed = []
        for weight, made_as in zip(weights, self._made_as, strict=True):
            staged = weight.held
            differs, was_taken = fingerprint(staged) != made_as, data_was_taken(staged)
            if not (differs or was_taken):
                continue
            if staged is weight.registered or not weight.keeps_change_of(staged):
                continue  # the first: the layer has become resident meanwhile
            if not differs:
                again = fresh(weight)
                # a source that gives views gives the same memory again, with any change in it
                differs = again.data_ptr() == staged.data_ptr() or not torch.equal(staged, again)
            if differs:
                changed.append((weight, staged.detach()))
        return changed
