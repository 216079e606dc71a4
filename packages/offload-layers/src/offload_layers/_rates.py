"""How fast a machine moves and computes."""

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rates:
    """What a second is enough for.

    Attributes:
        disk_bytes_per_s: Reading from disk; ``math.inf`` if nothing is read from one.
        bus_bytes_per_s: Copying from the host to the device; ``memory_bytes_per_s`` where they share memory.
        memory_bytes_per_s: Reading the memory in which the device computes.
        flops: Operations of matrix products with many rows: two for each multiplication and addition.
        disk_processor_s_per_byte: For how long reading from disk keeps a core busy, which a model that
            computes on the CPU cannot use then.
    """

    disk_bytes_per_s: float
    bus_bytes_per_s: float
    memory_bytes_per_s: float
    flops: float
    disk_processor_s_per_byte: float = 0.0

    def to_dict(self) -> dict[str, float | None]:
        """Return the rates in types that JSON has, where what has no end is None."""
        return {name: None if rate == math.inf else rate for name, rate in dataclasses.asdict(self).items()}
