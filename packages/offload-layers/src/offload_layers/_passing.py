"""What it takes to bring the weights of a layer to the device for one computation.

It follows from where they rest, and is worked out once for that, not for each call.
"""

import functools

from offload_layers._placement import Placement
from offload_layers._weight import Weight


class Passing:
    """That of one layer.

    Attributes:
        version: Of what the model holds at rest.
        on_disk: Names of the weights that are read from the source.
        copy_nbytes: Bytes of the device that the copies take.
        rests_on_device: Whether the device has the weights at rest, be it in another dtype.
        changes_unseen: Whether weights at rest may change without a trace: see Note [Weights that rest on the
            device] in ``_device``.
        may_be_views: Whether the copies may turn out to be views of the source's memory.
    """

    def __init__(self, weights: list[Weight], computation: Placement, version: int) -> None:
        self.version = version
        self.on_disk = [weight.name for weight in weights if weight.registered.is_meta]
        self._coming = [weight for weight in weights if not computation.holds(weight.registered)]
        self.copy_nbytes = sum(weight.nbytes_in(computation) for weight in self._coming)
        self.rests_on_device = any(weight.registered.device == computation.device for weight in weights)
        devices = {weight.registered.device.type for weight in weights}
        self.changes_unseen = not devices <= {"cpu", "meta"}
        self.may_be_views = bool(self.on_disk) and computation.device.type == "cpu"

    @functools.cached_property
    def moving_nbytes(self) -> int:
        """Bytes that are moved for copies, known once they have been made."""
        return sum(weight.nbytes_from(weight.registered) for weight in self._coming)
