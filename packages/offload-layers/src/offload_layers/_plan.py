"""What will be where, and what it will cost: decided and predicted before anything is loaded.

Weights can stay on the device, stay in host memory, or stay on disk. What is on the device costs nothing;
what is in host memory crosses the bus in each forward; what is on disk is read in each forward too. The
device's memory is given to the layers that hide least behind computation, then the host's.

Note [Peaks]
    A forward holds, beside the residents, the layer that computes and those that are fetched ahead, at most
    ``PASSING`` of the largest; what stays leaves room for ``IN_FLIGHT`` of them, and the limit bounds all. On
    a CPU nothing is fetched ahead if the source brings weights closer by itself: there it is the computing
    layer alone. On the host there are the weights that stay there, one layer on its way from disk, and the
    page-locked ring. A layer that fits into the ring is read beside it in the first forward only; later it is
    read into the ring, which grows for it.

Note [One memory]
    On a CPU the host's memory is the device's. Weights that no source can give again are in it all the time:
    as they are computed with, if the layer stays on the device, which takes no copy; otherwise as they are
    stored, beside the copies that are made for computing. The books of the device count copies only, so what
    rests is taken off the limit for them.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from offload_layers._budget import IN_FLIGHT
from offload_layers._choice import Demand, choose_residents
from offload_layers._errors import ConfigError
from offload_layers._pinned import CHUNK, LARGEST, ring_nbytes
from offload_layers._plan_picture import plot_plan
from offload_layers._prefetch import LARGEST_AHEAD
from offload_layers._rates import Rates
from offload_layers._sizes import format_size
from offload_layers._tier import Tier
from offload_layers._work import Work

#: of the largest layer: what is on the device beside the residents
PASSING = 1 + LARGEST_AHEAD
_RING_NBYTES = 2 * CHUNK
#: layers that compute for the time step alone, not for every token. Source: the names of the transformers
#: in diffusers and DiffSynth-Studio, where they hold up to a third of the weights
_COMPUTED_ONCE = re.compile(
    r"(^|[._])(mod|modulation|ada_?ln\w*|time\w*|temb|guidance\w*)([._]|$)|(^|\.)norm\w*\.linear$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LayerSize:
    """One layer as a plan sees it.

    Attributes:
        name: Dotted name.
        numel: Elements of its weights.
        nbytes: Bytes that they take where they compute.
        stored_nbytes: Bytes that they take where they rest, which are those that cross the bus.
        is_on_disk: Whether a source can give them.
    """

    name: str
    numel: int
    nbytes: int
    stored_nbytes: int
    is_on_disk: bool = True

    @property
    def is_computed_once(self) -> bool:
        """Whether the layer is computed for one row of input only, as its name tells: a modulation."""
        return _COMPUTED_ONCE.search(self.name) is not None

    def work(self, rows: int) -> float:
        """Return the multiplications that a forward with *rows* rows takes."""
        return float(self.numel * (1 if self.is_computed_once else rows))


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
        return sum(_nbytes(layer.size, tier) for layer in self.layers if layer.tier is tier)

    @property
    def moving_nbytes(self) -> int:
        """Bytes that cross the bus in a forward."""
        return sum(layer.size.stored_nbytes for layer in self.layers if layer.tier is not Tier.DEVICE)

    @property
    def beside_nbytes(self) -> int:
        """Bytes of *vram* that computations take beside weights, as far as that is known."""
        return _beside_nbytes(self.device, self.work)

    @property
    def resting_nbytes(self) -> int:
        """Bytes of the device's memory that weights take without being copies; see Note [One memory]."""
        if self.device.type != "cpu":
            return 0
        return sum(_nbytes(layer.size, layer.tier) for layer in self.layers if not layer.size.is_on_disk)

    @property
    def limit_nbytes(self) -> int:
        """Bytes of the device that may be in use for copies of weights to stay there."""
        return min(self.vram, self.ram - self.resting_nbytes) if self.device.type == "cpu" else self.vram

    @property
    def peak_device_nbytes(self) -> int:
        """Most bytes of weights on the device at once; see Note [Peaks] and Note [One memory]."""
        is_one = self.device.type == "cpu"
        copied = [layer for layer in self.layers if layer.size.is_on_disk or not is_one]
        staying = sum(layer.size.nbytes for layer in copied if layer.tier is Tier.DEVICE)
        moving = [layer.size.nbytes for layer in self.layers if layer.tier is not Tier.DEVICE]
        passing = sum(sorted(moving)[-PASSING if self.fetches_ahead else -1 :])
        room = self.limit_nbytes - self.foreign_nbytes - self.beside_nbytes
        return self.resting_nbytes + min(staying + passing, max(room, max(moving, default=0)))

    @property
    def peak_host_nbytes(self) -> int:
        """Most bytes of weights in host memory at once, if that is not the device; see Note [Peaks]."""
        if self.device.type == "cpu":
            return 0
        from_disk = max((x.size.stored_nbytes for x in self.layers if x.tier is Tier.DISK), default=0)
        kept = sum(
            layer.size.stored_nbytes
            for layer in self.layers
            if layer.tier is Tier.HOST or not layer.size.is_on_disk
        )
        return kept + _passing_host(from_disk)

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
        read = self.nbytes_on(Tier.DISK)
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
        total = sum(layer.size.stored_nbytes for layer in self.layers)
        lines = [
            f"{len(self.layers):,} layers, {format_size(total)}, computing on {self.device} with "
            f"{format_size(self.vram)} of its memory"
            + ("" if self.device.type == "cpu" else f" and {format_size(self.ram)} of the host's")
        ]
        for tier in Tier:
            count = sum(layer.tier is tier for layer in self.layers)
            if count:
                lines.append(f"  {tier.value:<7}{count:>6,} layers  {format_size(self.nbytes_on(tier)):>9}")
        lines.append(f"  peak   {format_size(self.peak_device_nbytes)} of weights on {self.device}")
        if self.work is not None:
            lines[-1] += f", {format_size(self.work.activations_nbytes)} of activations beside them"
        if self.peak_host_nbytes:
            lines[-1] += f", {format_size(self.peak_host_nbytes)} in host memory"
        prediction = self.predict()
        if prediction is not None:
            lines.append(
                f"  one forward {self.of_what}: {prediction.total_s:.3g} s (computation "
                f"{prediction.compute_s:.3g} s, bus {prediction.bus_s:.3g} s, disk {prediction.disk_s:.3g} s)"
            )
            lines += self._more()
        return "\n".join(lines)

    def _more(self) -> list[str]:
        """Say what more memory would give, where it would give at least a twentieth."""
        now, lines = self.predict(), []
        assert now is not None
        is_one = self.device.type == "cpu"
        kinds = [_limiting(self.device, self.vram, self.ram)] if is_one else ["vram", "ram"]
        for more in (2 * 10**9, 4 * 10**9, 8 * 10**9):
            for what in kinds:
                then = self.with_more(**{what: more}).predict()
                assert then is not None
                if then.total_s < 0.95 * now.total_s:
                    lines.append(
                        f"  {what} +{format_size(more)}: {now.total_s:.3g} -> {then.total_s:.3g} s a forward"
                    )
        return lines


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
    _check_host(sizes, device, ram)
    rests = [device.type == "cpu" and not size.is_on_disk for size in sizes]  # see Note [One memory]
    resting = _fixed_nbytes(sizes, device) if device.type == "cpu" else 0
    costs = [max(0, x.nbytes - x.stored_nbytes) if r else x.nbytes for x, r in zip(sizes, rests, strict=True)]
    copied = [size for size, rest, cost in zip(sizes, rests, costs, strict=True) if cost or not rest]
    largest = max(copied, key=lambda size: size.nbytes, default=LayerSize("", 0, 0, 0))
    beside_nbytes = _beside_nbytes(device, work)
    room = vram - foreign_nbytes - beside_nbytes
    if device.type == "cpu":
        room = min(room, ram - resting)
    everything = sum(costs)
    if largest.nbytes > room < everything:
        taken = [f"{format_size(foreign_nbytes)} are taken by others"] if foreign_nbytes else []
        taken += [f"{format_size(beside_nbytes)} are needed for activations"] if beside_nbytes else []
        taken += [f"{format_size(resting)} are weights which no source can give again"] if resting else []
        given = f"{_limiting(device, vram, ram)} is {format_size(vram)}{', of which ' if taken else ''}"
        least = largest.nbytes + foreign_nbytes + beside_nbytes + resting
        raise ConfigError(
            f'layer "{largest.name}" needs {format_size(largest.nbytes)} on {device} while it computes, but '
            f"{given}{' and '.join(taken)}. Give at least {format_size(least)}."
        )
    window = LARGEST_AHEAD * largest.nbytes
    works = [size.work(rows) if work is None else work.layer_s.get(size.name, 0.0) for size in sizes]
    demands = [Demand(cost, hides) for cost, hides in zip(costs, works, strict=True)]
    stay_room = everything if everything <= room else max(0, room - IN_FLIGHT * largest.nbytes)
    on_device = choose_residents(demands, room=stay_room, window=window)
    on_device |= {i for i, rest in enumerate(rests) if rest and not costs[i]}
    if device.type == "cpu":  # the host is the device: what does not stay there is where it came from
        on_host = frozenset(i for i, size in enumerate(sizes) if not size.is_on_disk) - on_device
    else:
        on_host = _host(sizes, works, on_device, device, ram=ram, window=window)
    tiers = [
        Tier.DEVICE if i in on_device else Tier.HOST if i in on_host else Tier.DISK for i in range(len(sizes))
    ]
    layers = tuple(PlannedLayer(size, tier) for size, tier in zip(sizes, tiers, strict=True))
    return Plan(device, vram, ram, layers, rows, rates, foreign_nbytes, fetches_ahead, work)


def _limiting(device: torch.device, vram: int, ram: int) -> str:
    """Return which argument limits the weights on the device: on a CPU the smaller of both."""
    return "ram" if device.type == "cpu" and ram <= vram else "vram"


def _beside_nbytes(device: torch.device, work: Work | None) -> int:
    """Return what computations take of *vram*, which on a CPU is a limit of weights alone."""
    return 0 if work is None or device.type == "cpu" else work.activations_nbytes


def _check_host(sizes: Sequence[LayerSize], device: torch.device, ram: int) -> None:
    """Refuse what takes more host memory than *ram*, whatever stays on the device."""
    without = [size for size in sizes if not size.is_on_disk]  # their weights are in host memory anyway
    needed = _fixed_nbytes(sizes, device)
    if needed <= ram:
        return
    parts = [] if device.type == "cpu" else [f"{format_size(_RING_NBYTES)} for page-locked buffers"]
    if without:
        parts.append(f"the weights of {len(without):,} layers which no source can give again")
    remedy = "Pass source=, so that weights may stay on disk, or give" if without else "Give"
    raise ConfigError(
        f"{format_size(needed)} of host memory are needed ({' and '.join(parts)}), but ram is "
        f"{format_size(ram)}. {remedy} at least so much."
    )


def _fixed_nbytes(sizes: Sequence[LayerSize], device: torch.device) -> int:
    without = [size for size in sizes if not size.is_on_disk]
    if device.type == "cpu":  # where what stays on the device is not stored beside it
        return sum(min(size.nbytes, size.stored_nbytes) for size in without)
    return _RING_NBYTES + sum(size.stored_nbytes for size in without)


def _host(
    sizes: Sequence[LayerSize],
    works: Sequence[float],
    on_device: frozenset[int],
    device: torch.device,
    *,
    ram: int,
    window: int,
) -> frozenset[int]:
    """Return which of the layers that are not on the device stay in host memory."""
    moving = [i for i, size in enumerate(sizes) if i not in on_device and size.is_on_disk]
    demands = [Demand(sizes[i].stored_nbytes, works[i]) for i in moving]
    everything = sum(demand.nbytes for demand in demands)
    passing = max((demand.nbytes for demand in demands), default=0)  # one layer on its way from disk
    room = ram - _fixed_nbytes(sizes, device)
    if everything > room:
        room = max(0, room + _RING_NBYTES - _passing_host(passing))
    chosen = choose_residents(demands, room=room, window=window)
    others = {i for i, size in enumerate(sizes) if not size.is_on_disk and i not in on_device}
    return frozenset({moving[i] for i in chosen} | others)


def _passing_host(nbytes: int) -> int:
    """Return what a layer of *nbytes* on its way from disk takes of the host, with the ring."""
    beside = nbytes + _RING_NBYTES
    return beside if nbytes > LARGEST else max(beside, ring_nbytes(nbytes))


def _nbytes(size: LayerSize, tier: Tier) -> int:
    return size.nbytes if tier is Tier.DEVICE else size.stored_nbytes
