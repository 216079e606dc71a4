"""Sharded models: each rank of ``torch.distributed`` reads only the bytes of its own shards.

Note [Stopping together]
    Ranks meet twice: when every one has found its names, and when every one has read its bytes.  What went
    wrong on any rank is told at these points, so all ranks raise and none waits for another.  Parameters are
    assigned after the second: a load that fails leaves the model as it was.

Note [No broadcast]
    Ranks that hold the same bytes (replicas, tensors that are not sharded) read them each for itself.  On
    one machine the disk is read once in any case, because the others find the bytes in the page cache, and
    copying from there is faster than passing them on.  Source: ``benchmarks/sharded.py``.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from safemap._agree import Ranks, ShardedLoadError
from safemap._map import DiskMap
from safemap._paths import PathLike
from safemap._progress import progress as show_progress
from safemap._sharded_plan import Plan, ShardedLoadReport, make_plan
from safemap._sharded_read import read_shard

__all__ = ["ShardedLoadError", "ShardedLoadReport", "load_sharded"]

_log = logging.getLogger("safemap.distributed")


def load_sharded(
    model: nn.Module,
    disk_map: DiskMap | PathLike | Callable[[], DiskMap],
    *,
    strict: bool = True,
    progress: bool = True,
    torch_dtype: torch.dtype | None = None,
    group: ProcessGroup | None = None,
) -> ShardedLoadReport:
    """Fill a sharded model from a checkpoint; every rank reads only what it holds.  Collective.

    The model comes from ``fully_shard``, ``parallelize_module`` or ``distribute_tensor``, best on the meta
    device.  Parameters are replaced, as by ``load_state_dict(assign=True)``: make optimizers afterwards.
    Parameters that are one object stay one, and are read once, from whichever of their names the checkpoint
    has.

    Args:
        model: DTensors of any mesh and placement, plain tensors, or both.
        disk_map: The checkpoint, whose names are those of the model (see ``state_dict_converter``).  Shards
            go to its device.  A path, or a function that opens the map, is opened here, so that what goes
            wrong on one rank stops all of them.
        strict: Raise, before anything is read, if the model has names that the checkpoint lacks, or the
            checkpoint has names that the model lacks.
        progress: Show on the first rank how far it is, by tqdm or as log lines.
        torch_dtype: Of floating-point parameters.  None: that of the map if it has one, else that which the
            parameter has in the model.  Buffers and integers keep the dtype of the model.
        group: The ranks that load together; None for all.  A model may differ from rank to rank.

    Returns:
        Missing and unexpected names as torch reports them, and the bytes read by each rank.

    Raises:
        RuntimeError: *strict*, and names are missing or unexpected.
        MismatchError: shapes differ, a parameter is ``Partial``, or the ranks opened different checkpoints.
        ShardedLoadError: loading failed on another rank, or that rank has ended.
    """
    ranks: Ranks[tuple[str, int]] = Ranks(group)
    owned: list[DiskMap] = []
    try:
        plan, error = None, None
        try:
            opened = _open(disk_map, owned)
            plan = make_plan(model, opened, torch_dtype)
            plan.check(type(model).__name__, strict=strict)
        except Exception as failure:
            error = failure
        prints = ranks.agree(error, ("" if plan is None else plan.contents, 0))
        assert plan is not None
        plan.check_same([contents for contents, _ in prints])

        tensors: dict[str, Any] = {}
        try:
            with show_progress(
                "Loading shards", plan.nbytes, enabled=progress and ranks.rank == 0, log=_log
            ) as advance:
                for item in plan.items:
                    tensors |= dict.fromkeys(item.names, read_shard(opened, item))
                    advance(item.nbytes)
        except Exception as failure:
            error = failure
        read = ranks.agree(error, ("", plan.nbytes))
        return _assign(model, plan, tensors, strict=strict, bytes_read=tuple(nbytes for _, nbytes in read))
    finally:
        for map_ in owned:
            map_.close()


def _open(disk_map: DiskMap | PathLike | Callable[[], DiskMap], owned: list[DiskMap]) -> DiskMap:
    if isinstance(disk_map, DiskMap):
        return disk_map
    opened = DiskMap(disk_map) if isinstance(disk_map, (str, os.PathLike)) else disk_map()
    owned.append(opened)
    return opened


def _assign(
    model: nn.Module, plan: Plan, tensors: dict[str, Any], *, strict: bool, bytes_read: tuple[int, ...]
) -> ShardedLoadReport:
    tensors.update(plan.others)
    found = model.load_state_dict(tensors, strict=False, assign=True)  # its hooks tell FSDP2
    tied = set(plan.tied)
    missing = [name for name in found.missing_keys if name not in tied]
    unexpected = [*plan.unexpected, *found.unexpected_keys]
    if strict and (missing or unexpected):
        raise RuntimeError(plan.describe(type(model).__name__, missing, unexpected))
    return ShardedLoadReport(missing, unexpected, bytes_read)
