"""Which layer stays where, by its bytes and by how much computation there is to hide them behind."""

from collections.abc import Sequence

import torch

from offload_layers._budget import IN_FLIGHT
from offload_layers._choice import Demand, choose_residents
from offload_layers._errors import ConfigError
from offload_layers._layer_sizes import LayerSize, Repeated, around, together
from offload_layers._pinned import CHUNK, LARGEST, ring_nbytes
from offload_layers._prefetch import LARGEST_AHEAD
from offload_layers._sizes import format_size
from offload_layers._tier import Tier
from offload_layers._work import Work

_RING_NBYTES = 2 * CHUNK


def choose_tiers(
    sizes: Sequence[LayerSize],
    works: Sequence[float],
    *,
    device: torch.device,
    vram: int,
    ram: int,
    taken: dict[str, int],
) -> list[Tier]:
    """Give each layer a tier.

    Args:
        sizes: The layers in order.
        works: Computation of each, in any unit that is the same for all.
        device: That computes.
        vram: Bytes of the device that may be used.
        ram: Bytes of the host that may be used.
        taken: What of *vram* is not for weights, in words that go on after a number of bytes.

    Raises:
        ConfigError: it cannot fit, and why.
    """
    _check_host(sizes, device, ram)
    is_one = device.type == "cpu"
    rests = [is_one and not size.is_on_disk for size in sizes]  # see Note [One memory] in ``_plan``
    resting = fixed_nbytes(sizes, device) if is_one else 0
    costs = [_cost(size, rest) for size, rest in zip(sizes, rests, strict=True)]
    copied = [size for size, rest, cost in zip(sizes, rests, costs, strict=True) if cost or not rest]
    room = vram - sum(taken.values())
    if is_one:
        room = min(room, ram - resting)
    repeated = (_cost(part, rest) for size, rest in zip(sizes, rests, strict=True) for part in size.repeated)
    everything = sum(costs) - sum(repeated)
    if room < everything:
        _check_device(copied, device, vram, ram, room, taken, resting)
    largest = max((size.nbytes for size in copied), default=0)
    window = LARGEST_AHEAD * largest
    demands = [Demand(cost, work) for cost, work in zip(costs, works, strict=True)]
    if everything <= room:
        on_device = frozenset(range(len(sizes)))
    else:
        on_device = choose_residents(demands, room=max(0, room - IN_FLIGHT * largest), window=window)
    on_device |= {i for i, rest in enumerate(rests) if rest and not costs[i]}
    names = {sizes[i].name for i in on_device}
    on_device |= {i for i, size in enumerate(sizes) if size.nbytes and size.nbytes_beside(names) == 0}
    if is_one:  # the host is the device: what does not stay there is where it came from
        on_host = frozenset(i for i, size in enumerate(sizes) if not size.is_on_disk) - on_device
    else:
        on_host = _host(sizes, works, on_device, device, ram=ram, window=window)
    return [
        Tier.DEVICE if i in on_device else Tier.HOST if i in on_host else Tier.DISK for i in range(len(sizes))
    ]


def limiting(device: torch.device, vram: int, ram: int) -> str:
    """Return which argument limits the weights on the device: on a CPU the smaller of both."""
    return "ram" if device.type == "cpu" and ram <= vram else "vram"


def beside_nbytes(device: torch.device, work: Work | None) -> int:
    """Return what computations take of *vram*, which on a CPU is a limit of weights alone."""
    return 0 if work is None or device.type == "cpu" else work.activations_nbytes


def fixed_nbytes(sizes: Sequence[LayerSize], device: torch.device) -> int:
    """Return what weights take of the host's memory wherever the layers stay."""
    without = [size for size in sizes if not size.is_on_disk]
    if device.type == "cpu":  # where what stays on the device is not stored beside it
        return together(without, lambda part: min(part.nbytes, part.stored_nbytes))
    return _RING_NBYTES + together(without, lambda part: part.stored_nbytes)


def passing_host(nbytes: int) -> int:
    """Return what a layer of *nbytes* on its way from disk takes of the host, with the ring."""
    beside = nbytes + _RING_NBYTES
    return beside if nbytes > LARGEST else max(beside, ring_nbytes(nbytes))


def _cost(part: LayerSize | Repeated, rests: bool) -> int:
    """Return what staying on the device takes, beside what rests there anyway."""
    return max(0, part.nbytes - part.stored_nbytes) if rests else part.nbytes


def _check_device(
    copied: Sequence[LayerSize],
    device: torch.device,
    vram: int,
    ram: int,
    room: int,
    taken: dict[str, int],
    resting: int,
) -> None:
    """Refuse a layer that cannot compute, with those that it is inside of."""
    outer = around(copied)
    largest = max(copied, key=lambda size: size.nbytes + outer[size.name])
    needed = largest.nbytes + outer[largest.name]
    if needed <= room:
        return
    parts = [f"{format_size(nbytes)} {what}" for what, nbytes in taken.items() if nbytes]
    parts += [f"{format_size(resting)} are weights which no source can give again"] if resting else []
    given = f"{limiting(device, vram, ram)} is {format_size(vram)}{', of which ' if parts else ''}"
    inside = " with the layers around it" if outer[largest.name] else ""
    least = needed + sum(taken.values()) + resting
    raise ConfigError(
        f'layer "{largest.name}"{inside} needs {format_size(needed)} on {device} while it computes, but '
        f"{given}{' and '.join(parts)}. Give at least {format_size(least)}."
    )


def _check_host(sizes: Sequence[LayerSize], device: torch.device, ram: int) -> None:
    """Refuse what takes more host memory than *ram*, whatever stays on the device."""
    without = [size for size in sizes if not size.is_on_disk]  # their weights are in host memory anyway
    needed = fixed_nbytes(sizes, device)
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
    everything = together([sizes[i] for i in moving], lambda part: part.stored_nbytes)
    passing = max((demand.nbytes for demand in demands), default=0)  # one layer on its way from disk
    room = ram - fixed_nbytes(sizes, device)
    others = {i for i, size in enumerate(sizes) if not size.is_on_disk and i not in on_device}
    if everything <= room:
        return frozenset(others.union(moving))
    room = max(0, room + _RING_NBYTES - passing_host(passing))
    chosen = choose_residents(demands, room=room, window=window)
    return frozenset(others.union(moving[i] for i in chosen))
