"""One shard: read into memory of its own, and given the form that the model has."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from safemap._map import DiskMap
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
    local = disk_map._allocate(local_shape(item.ranges), item.dtype)
    if local.numel():
        part = disk_map.slice(item.source)
        for whole, place in boxes(item.ranges):
            part.read_into(whole, local[place])
    return local


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
