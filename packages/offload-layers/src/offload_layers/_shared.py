"""What layers share stays shared: one copy for all layers of a model that have the same parameter.

Each layer brings its weights to where they rest by itself. A parameter of several layers (an embedding that
is the head as well) would come to rest once for each of them, and a change of one copy would not be seen in
the other. So whoever needs a copy in some placement gets that of a layer which has one already.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from offload_layers._budget import Lease
from offload_layers._changes import Fingerprint, fingerprint
from offload_layers._packed import PackedWeight
from offload_layers._placement import Placement
from offload_layers._source import Source, stored_name
from offload_layers._weight import Weight

Make = Callable[[Weight], nn.Parameter]
_Key = tuple[int, str, Placement]


@dataclass(frozen=True)
class _Copy:
    made_from: "weakref.ref[nn.Parameter]"
    made_as: Fingerprint
    parameter: "weakref.ref[nn.Parameter]"

    def is_of(self, registered: nn.Parameter) -> bool:
        """Whether it was made from *registered* as that is now."""
        return self.made_from() is registered and self.made_as == fingerprint(registered)


@dataclass(frozen=True)
class Lacking:
    """What a layer lacks of its copies in some placement.

    Attributes:
        weights: Those of which no layer has paid for a copy.
        nbytes: Bytes that their copies will take.
        found: The copies that others have, which must not go before they are this layer's, too.
    """

    weights: list[Weight]
    nbytes: int
    found: list[nn.Parameter]


class SharedCopies:
    """The copies that layers of one model hold, which they keep alive, not this; and who rests on what.

    What a copy on the device takes is borrowed once, and given back when the last of them has dropped it.
    """

    def __init__(self) -> None:
        self._holders: MutableMapping[nn.Parameter, weakref.WeakSet[Any]] = WeakTensorKeyDictionary()
        self._copies: dict[_Key, _Copy] = {}
        self._leases: MutableMapping[nn.Parameter, Lease] = WeakTensorKeyDictionary()
        self._lock = threading.RLock()

    def join(self, layer: object, home: nn.Parameter) -> None:
        """Learn that *layer* has *home* for values at rest."""
        with self._lock:
            self._holders.setdefault(home, weakref.WeakSet()).add(layer)

    def holders(self, home: nn.Parameter) -> list[Any]:
        """Return the layers that have had *home* for values at rest."""
        with self._lock:
            return list(self._holders.get(home, ()))

    @property
    def leased_nbytes(self) -> int:
        """Bytes that are borrowed for copies which layers share."""
        with self._lock:
            return sum(lease.nbytes for lease in self._leases.values())

    def lacking(self, weights: Iterable[Weight], placement: Placement, source: Source | None) -> Lacking:
        """Return of which *weights* no layer has paid for a copy in *placement*."""
        found, lacking = [], []
        for weight in weights:
            copy = self._find(weight, placement, source)
            if copy is None or copy not in self._leases:  # one that somebody outside of all layers holds
                lacking.append(weight)
            else:
                found.append(copy)
        return Lacking(lacking, sum(weight.nbytes_in(placement) for weight in lacking), found)

    def pay(self, copy: nn.Parameter, lease: Lease) -> None:
        """Keep *lease*, which pays for *copy*, until that is gone."""
        with self._lock:
            self._leases[copy] = lease

    def of(self, weight: Weight, placement: Placement, source: Source | None, make: Make) -> nn.Parameter:
        """Return the copy of *weight* in *placement* that another layer has, or what *make* gives."""
        registered = weight.registered
        if isinstance(weight, PackedWeight) or placement.holds(registered):
            return make(weight)
        key = self._key(weight, placement, source)
        with self._lock:
            found = self._find(weight, placement, source)
            if found is not None:
                return found
            copy = make(weight)
            if copy is not registered:
                reference = weakref.ref(copy, lambda gone: self._forget(key, gone))
                self._copies[key] = _Copy(weakref.ref(registered), fingerprint(registered), reference)
            return copy

    def _find(self, weight: Weight, placement: Placement, source: Source | None) -> nn.Parameter | None:
        if isinstance(weight, PackedWeight):
            return None
        with self._lock:
            known = self._copies.get(self._key(weight, placement, source))
            return known.parameter() if known is not None and known.is_of(weight.registered) else None

    def _forget(self, key: _Key, gone: "weakref.ref[nn.Parameter]") -> None:
        known = self._copies.get(key)
        if known is not None and known.parameter is gone:
            del self._copies[key]

    @staticmethod
    def _key(weight: Weight, placement: Placement, source: Source | None) -> _Key:
        """Return what makes copies the same: a source may have values under each name of a tie."""
        registered = weight.registered
        return id(registered), stored_name(source, weight.name) if registered.is_meta else "", placement
