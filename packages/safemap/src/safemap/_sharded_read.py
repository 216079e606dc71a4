"""One shard: read into memory of its own, and given the form that the model has.

Note [Memory of shards]
    Shards stay as long as the model does.  In memory of the map's pool each would be rounded up to 2 MiB
    (measured: 160 MiB for 16 shards of 8 MiB and 4 KiB), and what FSDP2 frees by padding a shard would be
    kept for tensors that nobody will read.
"""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from safemap._buffers import exact_memory
from safemap._map import DiskMap
from safemap._read import POOLED
from safemap._sharded_plan import Item
from safemap._shards import boxes, local_shape


def read_shard(disk_map: DiskMap, item: Item) -> Tensor:
    """Return a parameter, or a buffer, that takes the place of the one in the model."""
    with torch.no_grad():
        shard = _in_form_of(item.tensor, _read_local(disk_map, item))
    if isinstance(item.tensor, nn.Parameter):
        # as a Parameter, since torch would make one for each of its names otherwise
        return nn.Parameter(shard, requires_grad=item.tensor.requires_grad)
    return shard


def _read_local(disk_map: DiskMap, item: Item) -> Tensor:
    if item.ranges is None:
        return torch.empty(0, dtype=item.dtype, device=disk_map.device)
    local = _allocate(disk_map, local_shape(item.ranges), item.dtype)
    if local.numel():
        part = disk_map.slice(item.source)
        for whole, place in boxes(item.ranges):
            part.read_into(whole, local[place])
    return local


def _allocate(disk_map: DiskMap, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return uninitialized memory where tensors of the map go; see Note [Memory of shards]."""
    pin = bool(disk_map._options["pin_memory"])
    nbytes = math.prod(shape) * dtype.itemsize
    if disk_map.device.type == "cpu" and not pin and nbytes >= POOLED:
        memory = exact_memory(nbytes)
        if memory is not None:
            return torch.frombuffer(memory, dtype=dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device=disk_map.device, pin_memory=pin)


def _in_form_of(tensor: Tensor, local: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return local
    if (
        tensor.device_mesh.device_type == local.device.type
        and tensor.device_mesh.get_coordinate() is not None
    ):
        return DTensor.from_local(
            local,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    # from_local would move it to the device of the mesh; FSDP2's CPUOffloadPolicy wants it where it is
    shard = torch.empty_like(tensor, dtype=local.dtype, device=local.device)
    if local.numel():
        assert isinstance(shard, DTensor)
        shard.to_local().copy_(local)
    return shard
