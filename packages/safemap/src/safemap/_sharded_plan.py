"""What a rank will read for a model, decided before anything is read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from safemap._errors import MismatchError
from safemap._map import DiskMap
from safemap._shards import Range, boxes, local_ranges, local_shape

# Source: _NormBase._load_from_state_dict of torch makes it up for checkpoints from before it existed
_MADE_UP_BY_TORCH = "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class ShardedLoadReport:
    """What ``load_sharded`` did.

    Attributes:
        missing_keys: Names of the model that the checkpoint lacks; what they name was left as it was.
        unexpected_keys: Names of the checkpoint that the model lacks; nothing of them was read.
        bytes_read: By each rank of the group, from files, for tensors; headers not counted.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    bytes_read: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One parameter or buffer to read.

    Attributes:
        names: Its names in the model; more than one if it is tied.
        source: The one in the checkpoint that it is read from.
        tensor: What is in the model now.
        ranges: What this rank holds, for each dimension; None where it is not in the mesh.
        dtype: What it is converted to.
        nbytes: Bytes that reading takes.
    """

    names: list[str]
    source: str
    tensor: Tensor
    ranges: list[list[Range]] | None
    dtype: torch.dtype
    nbytes: int


@dataclass(slots=True)
class Plan:
    """Everything that a rank will do.

    Attributes:
        items: In the order of the files.
        others: Extra state of modules, which is no tensor.
        tied: Names that the checkpoint lacks but that are tied to one it has.
        missing: Names of the model that it lacks.
        unexpected: Names of the checkpoint that the model lacks.
        wrong: Tensors whose shapes differ, described.
        contents: Digest of names, dtypes and shapes in the checkpoint.
    """

    items: list[Item] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict)
    tied: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    contents: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes that this rank reads."""
        return sum(item.nbytes for item in self.items)

    def check(self, model: str, *, strict: bool) -> None:
        """Raise if the model cannot be filled from this checkpoint."""
        if self.wrong:
            raise MismatchError("\n\t".join([f"Error(s) in loading shards for {model}:", *self.wrong]))
        missing = [name for name in self.missing if name.rpartition(".")[2] != _MADE_UP_BY_TORCH]
        if strict and (missing or self.unexpected):
            raise RuntimeError(self.describe(model, missing, self.unexpected))

    def check_same(self, contents: Sequence[str]) -> None:
        """Raise if another rank opened another checkpoint; all ranks do."""
        for other, digest in enumerate(contents):
            if digest != contents[0]:
                raise MismatchError(
                    f"ranks 0 and {other} opened checkpoints that differ in names, dtypes or shapes. "
                    "Give every rank the same files. Nothing was assigned on any rank."
                )

    def describe(self, model: str, missing: Sequence[str], unexpected: Sequence[str]) -> str:
        """Return what torch would say."""
        lines = [f"Error(s) in loading shards for {model}:"]
        if unexpected:
            lines.append(f"Unexpected key(s) in state_dict: {_quoted(unexpected)}.")
        if missing:
            lines.append(f"Missing key(s) in state_dict: {_quoted(missing)}.")
        lines.append("Pass strict=False to go on, or a state_dict_converter to the map to rename.")
        return "\n\t".join(lines)


def make_plan(model: nn.Module, disk_map: DiskMap, torch_dtype: torch.dtype | None) -> Plan:
    """Compare a model with a checkpoint."""
    # kept as variables: ties are seen by identity.  The hooks of the model rename, and put FSDP2's parameters
    # back into shards if a forward has left them whole
    state = model.state_dict(keep_vars=True)
    plan = Plan(contents=_digest(disk_map))
    names_of: dict[int, list[str]] = {}
    for name, value in state.items():
        names_of.setdefault(id(value) if isinstance(value, Tensor) else id(name), []).append(name)
    for names in names_of.values():
        tensor = state[names[0]]
        present = [name for name in names if name in disk_map]
        if not present:
            plan.missing += names
        elif not isinstance(tensor, Tensor):
            plan.others[names[0]] = disk_map[names[0]]
        else:
            plan.tied += [name for name in names if name not in disk_map]
            # the last one, which is what remains when torch copies them one after the other
            _add(plan, names, present[-1], tensor, disk_map, torch_dtype)
    plan.unexpected = [name for name in disk_map if name not in state]
    place = {item.source: _place(disk_map, item.source) for item in plan.items}
    plan.items.sort(key=lambda item: place[item.source])
    return plan


def _add(
    plan: Plan,
    names: list[str],
    source: str,
    tensor: Tensor,
    disk_map: DiskMap,
    torch_dtype: torch.dtype | None,
) -> None:
    info = disk_map.info(source)
    if info.shape != tensor.shape:
        plan.wrong.append(
            f"size mismatch for {source}: copying a param with shape {info.shape} from checkpoint, "
            f"the shape in current model is {tensor.shape}."
        )
        return
    ranges = _ranges(source, tensor)
    dtype = tensor.dtype
    if isinstance(tensor, nn.Parameter) and dtype.is_floating_point:
        dtype = torch_dtype or disk_map.torch_dtype or dtype
    nbytes = 0
    if ranges is not None and all(local_shape(ranges)):
        part = disk_map.slice(source)
        nbytes = sum(part.nbytes(whole) for whole, _ in boxes(ranges))
    plan.items.append(Item(names, source, tensor, ranges, dtype, nbytes))


def _ranges(name: str, tensor: Tensor) -> list[list[Range]] | None:
    if not isinstance(tensor, DTensor):
        return [[(0, extent)] for extent in tensor.shape]
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    ranges = local_ranges(tensor.shape, mesh.shape, coordinate, tensor.placements)
    local = tensor.to_local().shape
    if local_shape(ranges) != tuple(local):
        raise MismatchError(
            f'the shard of "{name}" {list(tensor.shape)} placed as {tensor.placements} on a mesh of '
            f"{list(mesh.shape)} has shape {list(local)}; by its placements it should have "
            f"{list(local_shape(ranges))}. This version of torch shards it in a way that is not known here."
        )
    return ranges


def _place(disk_map: DiskMap, name: str) -> tuple[str, int]:
    info = disk_map.info(name)
    return info.file, -1 if info.offset is None else info.offset


def _digest(disk_map: DiskMap) -> str:
    digest = hashlib.sha256()
    for name in disk_map.sizes():
        info = disk_map.info(name)
        digest.update(f"{name!r} {info.dtype} {tuple(info.shape)}\n".encode())
    return digest.hexdigest()


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
