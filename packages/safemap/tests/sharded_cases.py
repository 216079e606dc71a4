"""What one rank does in the tests of ``safemap.distributed``; run by ``test_sharded.py`` in processes.

``python sharded_cases.py WORLD FOLDER CASE...`` runs cases in order, on processes forked after the imports,
which take longer than all cases.  What came of each is written to ``FOLDER/CASE.WORLD.RANK``: "ok", or a
traceback.
"""

import ctypes
import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import safemap._read
import safemap.distributed
import torch
import torch.distributed as dist
from safemap import DiskMap, FileChangedError, MismatchError, MissingFileError
from safemap.distributed import ShardedLoadError, load_sharded
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WIDTH, WORDS = 16, 37  # an odd number of words, so that no number of ranks divides it


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.ones(1, WIDTH))  # all ranks but one have nothing of it

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Tied weights, buffers of three kinds, shapes that no mesh divides."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("scale", torch.full((WIDTH,), 0.5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) * self.scale - self.mean
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plain_net() -> Net:
    generator = torch.Generator().manual_seed(0)
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.1, generator=generator)
        net.mean.normal_(0, 0.1, generator=generator)
        net.steps.fill_(7)
    return net


def meta_net() -> Net:
    """The skeleton: parameters on meta, buffers real."""
    net = Net()
    meta = {id(p): nn.Parameter(p.to("meta")) for p in net.parameters()}
    for module in net.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = meta[id(parameter)]
    return net


def saved(net: nn.Module) -> dict[str, Tensor]:
    """The state dict as files are published: without the second name of the tied weight."""
    return {name: value for name, value in net.state_dict().items() if name != "head.weight"}


IDS = torch.arange(12).view(2, 6)

# ---------------------------------------------------------------------------------------------- helpers


@contextmanager
def recorded_reads() -> Iterator[list[tuple[int, int]]]:
    """Every range that this process reads by ``preadv``: (start, stop)."""
    reads: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(fd, buffers, offset, *flags):
        count = real(fd, buffers, offset, *flags)
        if not flags:  # with flags it only asks whether pages are in memory
            reads.append((offset, offset + count))
        return count

    os.preadv, safemap._read._preadv = preadv, preadv
    try:
        yield reads
    finally:
        os.preadv = safemap._read._preadv = real


def gathered(value: object) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_reads(reads: list[tuple[int, int]], report, data: tuple[int, int] | None = None) -> None:
    """The report tells what was read; with *data*, all ranks together read each of its bytes once."""
    counts = gathered(sum(stop - start for start, stop in reads))
    assert list(report.bytes_read) == counts, (report.bytes_read, counts)
    if data is not None:
        every = sorted(r for of_rank in gathered(reads) for r in of_rank if r[0] != r[1])
        position = data[0]
        for start, stop in every:
            assert start == position, f"byte {position} to {start}: a gap, or read twice"
            position = stop
        assert position == data[1]


def data_range(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little"), path.stat().st_size


def assert_whole(model: nn.Module, plain: nn.Module) -> None:
    """Every tensor, put together again, has the bits of the plain model."""
    expected = plain.state_dict()
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        assert whole.dtype == expected[name].dtype, name
        assert torch.equal(whole, expected[name]), name


def line(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,))


def shard_net(net: Net, **options) -> Net:
    for block in net.blocks:
        fully_shard(block, **options)
    fully_shard(net, **options)
    return net


# ---------------------------------------------------------------------------------------------- cases


def fsdp(rank: int, world: int, folder: Path) -> None:
    """Uneven and empty shards, a tie, buffers; each byte is read by one rank, buffers by all."""
    plain = plain_net()
    net = shard_net(meta_net(), mesh=line(world))
    with recorded_reads() as reads:
        report = load_sharded(net, DiskMap(folder / "net.safetensors"))
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    check_reads(reads, report)
    sharded = sum(p.nbytes for p in plain.parameters())
    assert sum(report.bytes_read) == sharded + world * (plain.mean.nbytes + plain.steps.nbytes)
    assert net.head.weight is net.words.weight
    assert_whole(net, plain)
    out = net(IDS)
    assert torch.equal(out, plain(IDS))
    out.square().mean().backward()
    plain(IDS).square().mean().backward()
    found = net.words.weight.grad.full_tensor()
    torch.testing.assert_close(found, plain.words.weight.grad)


def each_byte_once(rank: int, world: int, folder: Path) -> None:
    """Parameters only, so the ranks share out the file."""
    plain = nn.Sequential(nn.Linear(7, 33), nn.Linear(33, 5, bias=False))
    net = nn.Sequential(nn.Linear(7, 33, device="meta"), nn.Linear(33, 5, bias=False, device="meta"))
    plain.load_state_dict(dict(DiskMap(folder / "linears.safetensors")))
    fully_shard(net, mesh=line(world))
    with recorded_reads() as reads:
        report = load_sharded(net, folder / "linears.safetensors")
    check_reads(reads, report, data_range(folder / "linears.safetensors"))
    assert_whole(net, plain)


def after_a_forward(rank: int, world: int, folder: Path) -> None:
    """A second load, into a model whose root was left whole by a forward, and into its optimizer's reach."""
    net = shard_net(meta_net(), mesh=line(world))
    load_sharded(net, folder / "net.safetensors")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net(IDS)
    load_sharded(net, folder / "net.safetensors")
    assert_whole(net, plain_net())
    assert torch.equal(net(IDS), plain_net()(IDS))


def policies(rank: int, world: int, folder: Path) -> None:
    """CPU offload and mixed precision; the result is that of torch's own way of loading."""
    options = {
        "mesh": line(world),
        "offload_policy": CPUOffloadPolicy(pin_memory=False),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    }
    expected = shard_net(plain_net(), **options)(IDS)
    net = shard_net(meta_net(), **options)
    load_sharded(net, folder / "net.safetensors")
    assert_whole(net, plain_net())
    found = net(IDS)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def dtypes(rank: int, world: int, folder: Path) -> None:
    """Parameters are converted; buffers and integers are not."""
    for by_map in (True, False):
        net = shard_net(meta_net(), mesh=line(world))
        disk_map = DiskMap(folder / "net.safetensors", torch_dtype=torch.bfloat16 if by_map else None)
        load_sharded(net, disk_map, torch_dtype=None if by_map else torch.bfloat16)
        plain = plain_net()
        for parameter in plain.parameters():
            parameter.data = parameter.data.bfloat16()
        assert_whole(net, plain)
    net = shard_net(meta_net(), mesh=line(world))
    load_sharded(net, folder / "half.safetensors")  # stored as bfloat16, wanted as the model has it
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def renamed(rank: int, world: int, folder: Path) -> None:
    """A converter that renames, transposes and joins; shards of the result are ranges of the sources."""

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {name.removeprefix("model."): value for name, value in state.items()}
        for number in range(2):
            up = f"blocks.{number}.up.weight"
            result[up] = torch.cat([result.pop(up + ".a"), result.pop(up + ".b")])
            down = f"blocks.{number}.down.weight"
            result[down] = result.pop(down + ".t").T
        return result

    net = shard_net(meta_net(), mesh=line(world))
    disk_map = DiskMap(folder / "odd.safetensors", state_dict_converter=convert)
    with recorded_reads() as reads:
        report = load_sharded(net, disk_map)
    check_reads(reads, report)
    assert_whole(net, plain_net())


def every_placement(rank: int, world: int, folder: Path) -> None:
    """Each placement of tensors with three dimensions, against ``distribute_tensor``."""
    mesh = line(world)
    compare_placements(mesh, [(p,) for p in (Shard(0), Shard(1), Shard(2), Replicate())], folder)


def every_pair_of_placements(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, world // 2))
    kinds = (Shard(0), Shard(1), Shard(2), Replicate())
    compare_placements(mesh, list(itertools.product(kinds, kinds)), folder)


def compare_placements(mesh: DeviceMesh, all_placements: list[tuple], folder: Path) -> None:
    disk_map = DiskMap(folder / "shapes.safetensors")
    for placements in all_placements:
        net, expected = nn.Module(), {}
        for name in disk_map:
            whole = disk_map[name]
            expected[name] = distribute_tensor(whole, mesh, placements)
            shard = torch.empty_like(expected[name], device="meta")
            net.register_parameter(name, nn.Parameter(shard))
        with recorded_reads() as reads:
            report = load_sharded(net, disk_map, progress=False)
        check_reads(reads, report)
        for name, parameter in net.named_parameters():
            assert parameter.placements == placements
            assert parameter.stride() == expected[name].stride()
            assert torch.equal(parameter.to_local(), expected[name].to_local()), (name, placements)


def pages_of_columns(rank: int, world: int, folder: Path) -> None:
    """Shards along the last dimension, at least a page wide, are read without their neighbours."""
    disk_map = DiskMap(folder / "wide.safetensors")
    whole = disk_map["wide"]
    net = nn.Module()
    expected = distribute_tensor(whole, line(world), [Shard(1)])
    net.register_parameter("wide", nn.Parameter(torch.empty_like(expected, device="meta")))
    with recorded_reads() as reads:
        report = load_sharded(net, disk_map)
    check_reads(reads, report, data_range(folder / "wide.safetensors"))
    assert torch.equal(net.wide.to_local(), expected.to_local())


def hybrid(rank: int, world: int, folder: Path) -> None:
    """HSDP: two replicas, each of which reads the file once."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "shard"))
    plain = plain_net()
    net = shard_net(meta_net(), mesh=mesh)
    report = load_sharded(net, folder / "net.safetensors")
    sharded = sum(p.nbytes for p in plain.parameters())
    assert sum(report.bytes_read) == 2 * sharded + world * (plain.mean.nbytes + plain.steps.nbytes)
    assert_whole(net, plain)
    assert torch.equal(net(IDS), plain(IDS))


def tensor_parallel(rank: int, world: int, folder: Path) -> None:
    mesh = line(world)
    net = meta_net()
    for block in net.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    with recorded_reads() as reads:
        report = load_sharded(net, folder / "net.safetensors")
    check_reads(reads, report)
    assert net.head.weight is net.words.weight
    assert_whole(net, plain_net())
    torch.testing.assert_close(net(IDS), plain_net()(IDS))


def both_along_one_dimension(rank: int, world: int, folder: Path) -> None:
    """FSDP2 over tensor parallelism: ``_StridedShard``, whose parts are several ranges."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    net = meta_net()
    for block in net.blocks:
        parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    shard_net(net, mesh=mesh["data"])
    assert "_StridedShard" in {type(p).__name__ for p in net.blocks[0].up.weight.placements}
    with recorded_reads() as reads:
        report = load_sharded(net, folder / "net.safetensors")
    check_reads(reads, report)
    assert_whole(net, plain_net())
    torch.testing.assert_close(net(IDS), plain_net()(IDS))


def part_of_the_ranks(rank: int, world: int, folder: Path) -> None:
    """A mesh without the last rank, which has nothing to read but must take part."""
    mesh = DeviceMesh("cpu", list(range(world - 1)))
    whole = DiskMap(folder / "linears.safetensors")["0.weight"]
    expected = distribute_tensor(whole, mesh, [Shard(0)])
    net = nn.Module()
    net.register_parameter("weight", nn.Parameter(torch.empty_like(expected, device="meta")))
    report = load_sharded(
        net,
        lambda: DiskMap(
            folder / "linears.safetensors", state_dict_converter=lambda state: {"weight": state["0.weight"]}
        ),
    )
    assert report.bytes_read[-1] == 0
    assert sum(report.bytes_read) == whole.nbytes
    assert torch.equal(net.weight.to_local(), expected.to_local())


def memory(rank: int, world: int, folder: Path) -> None:
    """Never more than the shards and one more, though FSDP2 copies uneven shards to pad them."""
    if not Path("/proc/self/clear_refs").exists():
        return
    sizes = DiskMap(folder / "large.safetensors")
    rows, columns = sizes.info("0.weight").shape
    like = {"bias": False, "dtype": torch.bfloat16, "device": "meta"}
    net = nn.Sequential(*(nn.Linear(columns, rows, **like) for _ in range(len(sizes))))
    for layer in net:
        fully_shard(layer, mesh=line(world))
    load_sharded(shard_net(meta_net(), mesh=line(world)), folder / "net.safetensors")  # it imports much
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_of_process("VmRSS")
    load_sharded(net, folder / "large.safetensors", progress=False)
    peak = memory_of_process("VmHWM") - before
    shards = [parameter.to_local().nbytes for parameter in net.parameters()]
    assert peak <= sum(shards) + max(shards) + (2 << 20), (peak, sum(shards), max(shards))
    assert peak > sum(shards) // 2, "nothing was measured"


def memory_of_process(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024


def names(rank: int, world: int, folder: Path) -> None:
    """Missing and unexpected names are those that torch reports for the plain model."""
    state = dict(DiskMap(folder / "names.safetensors"))
    expected = plain_net().load_state_dict(state, strict=False)
    net = shard_net(meta_net(), mesh=line(world))
    report = load_sharded(net, folder / "names.safetensors", strict=False)
    assert report.missing_keys == [n for n in expected.missing_keys if n != "head.weight"]
    assert sorted(report.unexpected_keys) == sorted(expected.unexpected_keys)
    assert net.blocks[1].gate.is_meta
    assert not net.blocks[0].gate.is_meta
    net = shard_net(meta_net(), mesh=line(world))
    with raises(RuntimeError, 'Missing key(s) in state_dict: "blocks.1.gate"', "Unexpected", '"other"'):
        load_sharded(net, folder / "names.safetensors")
    assert net.words.weight.is_meta, "something was read before the names were checked"


def shapes_differ(rank: int, world: int, folder: Path) -> None:
    net = shard_net(meta_net(), mesh=line(world))
    with raises(MismatchError, "size mismatch for blocks.0.gate", "[1, 17]"):
        load_sharded(net, folder / "shape.safetensors", strict=False)


@contextmanager
def raises(kind: type[Exception], *texts: str) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    for text in texts:
        assert text in str(caught.value)


# ------------------------------------------------------------------------------- what goes wrong on one rank


def missing_on_one_rank(rank: int, world: int, folder: Path) -> None:
    net = shard_net(meta_net(), mesh=line(world))
    path = folder / ("net.safetensors" if rank != 1 else "nothing.safetensors")
    expected = (MissingFileError, "no such file") if rank == 1 else (ShardedLoadError, f"rank 1 of {world}")
    with raises(expected[0], expected[1], "nothing.safetensors"):
        load_sharded(net, path)
    with raises(expected[0], expected[1], "nothing.safetensors"):
        load_sharded(net, lambda: DiskMap(path))
    assert net.words.weight.is_meta
    load_sharded(net, folder / "net.safetensors")  # the ranks are still in step
    assert_whole(net, plain_net())


def truncated_on_one_rank(rank: int, world: int, folder: Path) -> None:
    """Every rank has a copy of its own, and that of the last one loses its end after it was opened."""
    net = shard_net(meta_net(), mesh=line(world))
    copy = folder / f"copy-{world}-{rank}.safetensors"
    copy.write_bytes((folder / "net.safetensors").read_bytes())
    disk_map = DiskMap(copy)
    is_last = rank == world - 1
    if is_last:
        os.truncate(copy, copy.stat().st_size - 64)
    with raises(FileChangedError if is_last else ShardedLoadError, f"copy-{world}-{world - 1}.safetensors"):
        load_sharded(net, disk_map)
    assert net.words.weight.is_meta
    assert net.steps == 0


def different_on_one_rank(rank: int, world: int, folder: Path) -> None:
    net = nn.Sequential(nn.Linear(7, 33, device="meta"), nn.Linear(33, 5, bias=False, device="meta"))
    fully_shard(net, mesh=line(world))
    with raises(MismatchError, "ranks 0 and 1 opened checkpoints that differ"):
        load_sharded(net, folder / ("linears.safetensors" if rank != 1 else "linears-half.safetensors"))
    assert net[0].weight.is_meta


def killed_while_loading(rank: int, world: int, folder: Path) -> None:
    """The last case of its world, which is no whole one afterwards."""
    net = shard_net(meta_net(), mesh=line(world))
    if rank == world - 1:
        (folder / f"killed_while_loading.{world}.{rank}").write_text("ok")
        safemap.distributed.read_shard = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with raises(ShardedLoadError, "a rank has ended", f"on rank {rank} of {world}"):
        load_sharded(net, folder / "net.safetensors")
    assert time.monotonic() - begin < 20  # long before the timeout
    assert net.words.weight.is_meta


def run_rank(rank: int, world: int, folder: Path, chosen: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    for name in chosen:
        case: Callable[[int, int, Path], None] = globals()[name]
        try:
            case(rank, world, folder)
            told = "ok"
        except BaseException:  # pytest.raises fails with one
            told = traceback.format_exc()
        (folder / f"{name}.{world}.{rank}").write_text(told)
    dist.barrier()
    dist.destroy_process_group()


def main(world: int, folder: Path, chosen: list[str]) -> None:
    ranks = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                run_rank(rank, world, folder, chosen)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        ranks.append(child)
    for child in ranks:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
