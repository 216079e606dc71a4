"""The order in which a model calls its layers, learned while it runs.

Models call their layers in the same order forward after forward, and most call each layer once. Some call
one twice, or take another path now and then. So what follows is predicted from the last *two* layers, or
from the last one where that pair is new. A wrong prediction costs time, never correctness.

Before a model has run, it can be presumed that it calls its layers in the order in which it holds them.
"""

import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

Layer = TypeVar("Layer")
Place = tuple["weakref.ref[Layer] | None", "weakref.ref[Layer] | None"]


class ExecutionOrder(Generic[Layer]):
    """Which layer follows which. Layers are held weakly; each thread has a place of its own in the order.

    A place is the last two layers that were called.
    """

    def __init__(self) -> None:
        self._after_pair: dict[Place[Layer], weakref.ref[Layer]] = {}
        self._after_one: dict[weakref.ref[Layer], weakref.ref[Layer]] = {}
        self._presumed: dict[weakref.ref[Layer], weakref.ref[Layer]] = {}
        self._local = threading.local()

    def presume(self, layers: Sequence[Layer]) -> None:
        """Suppose that *layers* follow each other, as long as nothing else was seen."""
        self._presumed = {
            weakref.ref(before): weakref.ref(after) for before, after in itertools.pairwise(layers)
        }

    @property
    def place(self) -> "Place[Layer]":
        """Where this thread is."""
        place: Place[Layer] = getattr(self._local, "place", (None, None))
        return place

    @property
    def count(self) -> int:
        """How many steps from layer to layer are known or presumed."""
        return len(self._after_pair) + len(self._presumed)

    def saw(self, layer: Layer) -> None:
        """Learn that this thread calls *layer* now."""
        before, last = self.place
        now = weakref.ref(layer)
        if last is not None:
            self._after_pair[before, last] = now
            self._after_one[last] = now
        self._local.place = last, now

    def following(self, place: "Place[Layer]") -> "tuple[Layer, Place[Layer]] | None":
        """Return the layer that is called after *place*, and the place that it leads to; None if unknown."""
        last = place[1]
        if last is None:
            return None
        return self._step(last, self._after_pair.get(place) or self._after_one.get(last))

    def presumed(self, place: "Place[Layer]") -> "tuple[Layer, Place[Layer]] | None":
        """Return what is presumed where `following` knows nothing: the next layer that was not called yet."""
        last = place[1]
        if last is None:
            return None
        reference = self._presumed.get(last)
        while reference is not None and reference in self._after_one:
            reference = self._presumed.get(reference)
        return self._step(last, reference)

    def upcoming(self) -> Iterator[Layer]:
        """Yield the layers that this thread will call next, as far as they were seen, each step once."""
        place, steps = self.place, set()
        while (found := self.following(place)) is not None:
            layer, place = found
            if place in steps:
                return
            steps.add(place)
            yield layer

    @staticmethod
    def _step(
        last: "weakref.ref[Layer]", following: "weakref.ref[Layer] | None"
    ) -> "tuple[Layer, Place[Layer]] | None":
        layer = None if following is None else following()
        return None if layer is None else (layer, (last, following))
