"""What will be where, and what it will cost: decided and predicted before anything is loaded.

Weights can stay on the device, stay in host memory, or stay on disk. What is on the device costs nothing;
what is in host memory crosses the bus in each forward; what is on disk is read in each forward too. The
device's memory is given to the layers that hide least behind computation, then the host's.

Note [Peaks]
    A forward holds, beside the residents, the layer that computes with the weights of those around it, and
    those that are fetched ahead, ``LARGEST_AHEAD`` of the largest at most. What stays, if not all can, leaves
    room for ``IN_FLIGHT`` of the largest, and the limit bounds all. On a CPU nothing is fetched ahead if the
    source brings weights closer by itself: there it is the computing layer alone, in those around it. On the
    host there are the weights that stay there, one layer on its way from disk, and the page-locked ring. A
    layer that fits into the ring is read beside it in the first forward only; later it is read into the ring,
    which grows for it. What layers share, and have in one place, is there once.

Note [One memory]
    On a CPU the host's memory is the device's. Weights that no source can give again are in it all the time:
    as they are computed with, if the layer stays on the device, which takes no copy; otherwise as they are
    stored, beside the copies that are made for computing. The books of the device count copies only, so what
    rests is taken off the limit for them.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from offload_layers._errors import ConfigError
from offload_layers._layer_sizes import LayerSize, Repeated, around, together
from offload_layers._plan_picture import plot_plan
from offload_layers._plan_text import describe
from offload_layers._prefetch import LARGEST_AHEAD
from offload_layers._rates import Rates
from offload_layers._tier import Tier
from offload_layers._tier_choice import beside_nbytes, choose_tiers, passing_host
from offload_layers._work import Work


@dataclass(frozen=True)
class PlannedLayer:
    """A layer and its tier."""

    size: LayerSize
    tier: Tier


@dataclass(frozen=True)
class Prediction:
    """Seconds of one forward, and what they are made of.

    Attributes:
        compute_s: Computation alone.
        bus_s: Weights that cross the bus.
        disk_s: Weights that are read from disk.
        total_s: All of it, as far as it overlaps.
    """

    compute_s: float
    bus_s: float
    disk_s: float
    total_s: float


@dataclass(frozen=True)
class Plan:
    """What will be where.

    Attributes:
        device: That computes.
        vram, ram: Bytes of the device and of the host that may be used.
        layers: In order.
        rows: Rows of the input of a layer (tokens, pixels) that the prediction is for, unless there is
            *work*. Attention between them has no weights and is left out.
        rates: Of this machine; None: no prediction of times.
        foreign_nbytes: Bytes of the device that are taken by others.
        fetches_ahead: Whether copies of the layers that come next are made while a layer computes.
        work: What a forward on given inputs takes besides the weights; None: the time is told from *rows*.
    """

    device: torch.device
    vram: int
    ram: int
    layers: tuple[PlannedLayer, ...]
    rows: int
    rates: Rates | None
    foreign_nbytes: int = 0
    fetches_ahead: bool = True
    work: Work | None = None

    def nbytes_on(self, tier: Tier) -> int:
        """Return the bytes of the weights that stay on *tier*."""
        return together(self._on(tier), _computing if tier is Tier.DEVICE else _stored)

    @property
    def moving_nbytes(self) -> int:
        """Bytes that cross the bus in a forward."""
        return sum(size.stored_nbytes for size in self._on(Tier.HOST, Tier.DISK))

    @property
    def beside_nbytes(self) -> int:
        """Bytes of *vram* that computations take beside weights, as far as that is known."""
        return beside_nbytes(self.device, self.work)

    @property
    def resting_nbytes(self) -> int:
        """Bytes of the device's memory that weights take without being copies; see Note [One memory]."""
        if self.device.type != "cpu":
            return 0
        staying = [size for size in self._on(Tier.DEVICE) if not size.is_on_disk]
        others = [size for size in self._on(Tier.HOST, Tier.DISK) if not size.is_on_disk]
        return together(staying, _computing) + together(others, _stored)

    @property
    def limit_nbytes(self) -> int:
        """Bytes of the device that may be in use for copies of weights to stay there."""
        return min(self.vram, self.ram - self.resting_nbytes) if self.device.type == "cpu" else self.vram

    @property
    def peak_device_nbytes(self) -> int:
        """Most bytes of weights on the device at once; see Note [Peaks] and Note [One memory]."""
        is_one = self.device.type == "cpu"
        staying = [size for size in self._on(Tier.DEVICE) if size.is_on_disk or not is_one]
        moving = self._on(Tier.HOST, Tier.DISK)
        outer = around(moving)
        computing = max((size.nbytes + outer[size.name] for size in moving), default=0)
        ahead = sum(size.nbytes for size in moving) - max((size.nbytes for size in moving), default=0)
        window = LARGEST_AHEAD * max(layer.size.nbytes for layer in self.layers) if self.fetches_ahead else 0
        passing = computing + min(ahead, window)
        room = self.limit_nbytes - self.foreign_nbytes - self.beside_nbytes
        return self.resting_nbytes + min(together(staying, _computing) + passing, max(room, computing))

    @property
    def peak_host_nbytes(self) -> int:
        """Most bytes of weights in host memory at once, if that is not the device; see Note [Peaks]."""
        if self.device.type == "cpu":
            return 0
        from_disk = max((size.stored_nbytes for size in self._on(Tier.DISK)), default=0)
        kept = [x.size for x in self.layers if x.tier is Tier.HOST or not x.size.is_on_disk]
        return together(kept, _stored) + passing_host(from_disk)

    @property
    def of_what(self) -> str:
        """What a forward is predicted for, in words."""
        return f"of {self.rows:,} rows" if self.work is None else "on these inputs"

    def predict(self) -> Prediction | None:
        """Return the seconds of one forward once everything is in place; None without rates."""
        rates = self.rates
        if rates is None:
            return None
        if self.work is not None:
            compute = self.work.total_s
        else:
            compute = sum(
                max(2.0 * x.size.work(self.rows) / rates.flops, x.size.nbytes / rates.memory_bytes_per_s)
                for x in self.layers
            )
        bus = self.moving_nbytes / rates.bus_bytes_per_s
        read = sum(size.stored_nbytes for size in self._on(Tier.DISK))
        disk = read / rates.disk_bytes_per_s
        if self.device.type != "cpu":
            return Prediction(compute, bus, disk, max(compute, bus, disk))
        # whoever has waited for the disk copies what came, with a core that the computation wants, and the
        # disk has nothing to do meanwhile. Measured: 0.9 to 1.1 of this sum, half of a model on disk or all
        copying = read * rates.disk_processor_s_per_byte
        return Prediction(compute, bus, disk, max(compute + max(bus, copying), disk + copying))

    def with_more(self, *, vram: int = 0, ram: int = 0) -> "Plan":
        """Return the plan for so many more bytes of memory; of either on a CPU, where there is one."""
        sizes = [layer.size for layer in self.layers]
        is_one = self.device.type == "cpu"
        more_vram = self.vram + vram + (ram if is_one else 0)
        more_ram = max(self.ram + ram, more_vram if is_one else 0)
        return make_plan(
            sizes,
            device=self.device,
            vram=more_vram,
            ram=more_ram,
            rows=self.rows,
            rates=self.rates,
            foreign_nbytes=self.foreign_nbytes,
            fetches_ahead=self.fetches_ahead,
            work=self.work,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON has; a rate without an end is None."""
        prediction = self.predict()
        return {
            "device": str(self.device),
            "vram_nbytes": self.vram,
            "ram_nbytes": self.ram,
            "rows": self.rows,
            "nbytes": {tier.value: self.nbytes_on(tier) for tier in Tier},
            "layers_on": {tier.value: sum(x.tier is tier for x in self.layers) for tier in Tier},
            "moving_nbytes": self.moving_nbytes,
            "peak_device_nbytes": self.peak_device_nbytes,
            "peak_host_nbytes": self.peak_host_nbytes,
            "activations_nbytes": None if self.work is None else self.work.activations_nbytes,
            "rates": None if self.rates is None else self.rates.to_dict(),
            "prediction": None if prediction is None else dataclasses.asdict(prediction),
            "layers": [{**dataclasses.asdict(x.size), "tier": x.tier.value} for x in self.layers],
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw which layer is where into a file; needs the extra ``offload-layers[plot]``."""
        plot_plan(self, path)

    def __str__(self) -> str:
        return describe(self)

    def _on(self, *tiers: Tier) -> list[LayerSize]:
        return [layer.size for layer in self.layers if layer.tier in tiers]


def make_plan(
    sizes: Sequence[LayerSize],
    *,
    device: torch.device,
    vram: int,
    ram: int,
    rows: int,
    rates: Rates | None,
    foreign_nbytes: int = 0,
    fetches_ahead: bool = True,
    work: Work | None = None,
) -> Plan:
    """Give each layer a tier.

    Raises:
        ConfigError: it cannot fit, and why.
    """
    if not sizes:
        raise ConfigError("there is nothing to plan: no layer has weights")
    works = [size.work(rows) if work is None else work.layer_s.get(size.name, 0.0) for size in sizes]
    tiers = choose_tiers(
        sizes,
        works,
        device=device,
        vram=vram,
        ram=ram,
        taken={
            "are taken by others": foreign_nbytes,
            "are needed for activations": beside_nbytes(device, work),
        },
    )
    layers = tuple(PlannedLayer(size, tier) for size, tier in zip(sizes, tiers, strict=True))
    return Plan(device, vram, ram, layers, rows, rates, foreign_nbytes, fetches_ahead, work)


def _computing(part: LayerSize | Repeated) -> int:
    return part.nbytes


def _stored(part: LayerSize | Repeated) -> int:
    return part.stored_nbytes
