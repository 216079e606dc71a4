"""Filling a sharded model: safemap against torch's Hugging Face reader and a broadcast from rank 0.

``python sharded.py --output results/DATE-MACHINE-sharded.json``; the checkpoint is made once in ``--folder``.
Every run has processes of its own, forked after the imports; contenders take turns in an order drawn anew.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from owned_memory import owned_memory, use_free_memory
from safemap import DiskMap
from safemap.distributed import load_sharded
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

WIDTH, FILES = 2048, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False, dtype=torch.bfloat16)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
        self.norm = nn.RMSNorm(WIDTH, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(x)))


def make_model_on_meta(layers: int) -> nn.ModuleList:
    with torch.device("meta"):
        return nn.ModuleList(Layer() for _ in range(layers))


def make_checkpoint(folder: Path, layers: int) -> None:
    """In Hugging Face's layout: shards and an index."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    owners = {}
    names = list(make_model_on_meta(layers).state_dict())
    for number in range(FILES):
        name = f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        part = {}
        for key in names[number * len(names) // FILES : (number + 1) * len(names) // FILES]:
            shape = make_shape(key)
            part[key] = torch.randn(shape).to(torch.bfloat16)
            owners[key] = name
        save_file(part, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))


def make_shape(key: str) -> tuple[int, ...]:
    return {"up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH), "norm": (WIDTH,)}[key.split(".")[1]]


def make_skeleton(layers: int, dim: int | None) -> nn.Module:
    model = make_model_on_meta(layers)
    if dim is None:
        return model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(dim if parameter.ndim > dim else 0)

    for layer in model:
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    return model


# ----------------------------------------------------------------------------------- contenders


def by_safemap(model: nn.Module, folder: Path) -> None:
    load_sharded(model, folder / "model.safetensors.index.json", progress=False)


def by_torch(model: nn.Module, folder: Path) -> None:
    model.to_empty(device="cpu")
    state = model.state_dict()
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)))
    model.load_state_dict(state)


def by_broadcast(model: nn.Module, folder: Path) -> None:
    model.to_empty(device="cpu")
    state = {}
    if dist.get_rank() == 0:
        for path in sorted(folder.glob("*.safetensors")):
            state |= load_file(path)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)


def replicas_read(model: nn.Module, folder: Path) -> None:
    """Every rank wants everything, and reads it."""
    load_sharded(model, folder / "model.safetensors.index.json", progress=False)


def replicas_share(model: nn.Module, folder: Path) -> None:
    """Every rank wants everything; the first reads it and passes it on."""
    disk_map = DiskMap(folder / "model.safetensors.index.json")
    state = {}
    for name, parameter in model.state_dict().items():
        is_first = dist.get_rank() == 0
        tensor = disk_map[name] if is_first else torch.empty(parameter.shape, dtype=parameter.dtype)
        dist.broadcast(tensor, 0)
        state[name] = tensor
    model.load_state_dict(state, assign=True)


#: how to load, and the dimension that is sharded
CONTENDERS: dict[str, tuple[Callable[[nn.Module, Path], None], int | None]] = {
    "rows: safemap": (by_safemap, 0),
    "rows: HuggingFaceStorageReader": (by_torch, 0),
    "rows: broadcast from rank 0": (by_broadcast, 0),
    "columns: safemap": (by_safemap, 1),
    "columns: HuggingFaceStorageReader": (by_torch, 1),
    "replicas: each reads": (replicas_read, None),
    "replicas: one reads and broadcasts": (replicas_share, None),
}

# ----------------------------------------------------------------------------------- one rank


def _status(field: str) -> int:
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(field + ":"):
            return int(text.split()[1]) * 1024
    raise LookupError(field)


@contextmanager
def watched_memory(found: dict[str, int]) -> Iterator[None]:
    """Highest anonymous and total resident memory, above that at the start."""
    before = {field: _status(field) for field in ("RssAnon", "VmRSS")}
    highest = dict(before)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            for field in highest:
                highest[field] = max(highest[field], _status(field))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        found.update({field: highest[field] - before[field] for field in before})


def from_storage() -> int:
    """Bytes that this process made the disk read."""
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def local_sum(tensor: torch.Tensor) -> float:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return float(local.double().sum())


def run_rank(
    rank: int, store: str, folder: Path, options: argparse.Namespace, name: str, is_cold: bool
) -> None:
    world = options.world
    torch.set_num_threads(1)
    minute = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}/init", rank=rank, world_size=world, timeout=minute
    )
    load, dim = CONTENDERS[name]
    # once in vain: torch imports much at the first use
    load(make_skeleton(options.layers, dim), folder)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    model = make_skeleton(options.layers, dim)
    found: dict[str, float] = {}
    memory: dict[str, int] = {}
    if rank == 0:
        if is_cold:
            drop_pages(folder)
        use_free_memory()
    dist.barrier()
    read, start = from_storage(), time.perf_counter()
    with watched_memory(memory):
        load(model, folder)
        dist.barrier()
        found["seconds"] = time.perf_counter() - start
    found["from_storage"] = from_storage() - read
    found |= {"anonymous": memory["RssAnon"], "resident": memory["VmRSS"]}
    found["sum"] = sum(local_sum(parameter.detach()) for parameter in model.parameters())
    (Path(store) / str(rank)).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(folder: Path, options: argparse.Namespace, name: str, is_cold: bool) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as store:
        children = []
        for rank in range(options.world):
            child = os.fork()
            if child == 0:
                try:
                    run_rank(rank, store, folder, options, name, is_cold)
                except BaseException:
                    traceback.print_exc()
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        return [json.loads((Path(store) / str(rank)).read_text()) for rank in range(options.world)]


def drop_pages(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def fill_pages(folder: Path) -> None:
    """Anew: how large the pieces of the page cache are depends on how they were read."""
    drop_pages(folder)
    for path in folder.glob("*.safetensors"):
        path.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/safemap-benchmarks/sharded")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cold", action="store_true", help="also with the files' pages dropped before each run"
    )
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = options.folder / str(options.layers)
    make_checkpoint(folder, options.layers)
    names = [name for name in CONTENDERS if options.only in name]
    states = ["warm", "cold"] if options.cold else ["warm"]
    runs: dict[str, list[list[dict[str, float]]]] = {f"{n}, {s}": [] for s in states for n in names}
    importlib.import_module("torch._dynamo")  # before forking: operations on meta import it
    make_model_on_meta(1)
    with owned_memory(4 << 30):
        for _ in range(options.rounds):
            for state in states:
                for name in random.sample(names, len(names)):
                    fill_pages(folder)
                    runs[f"{name}, {state}"].append(run(folder, options, name, state == "cold"))
    rows = {}
    for name, of_rounds in runs.items():
        rows[name] = {
            "seconds": statistics.median(r[0]["seconds"] for r in of_rounds),
            "all_seconds": [round(r[0]["seconds"], 3) for r in of_rounds],
            **{
                key: [int(max(r[rank][key] for r in of_rounds)) for rank in range(options.world)]
                for key in ("from_storage", "anonymous", "resident")
            },
        }
        sums = {tuple(rank["sum"] for rank in r) for r in of_rounds}
        assert len(sums) == 1, f"{name}: not the same values each time"
        rows[name]["sum"] = sums.pop()
        print(
            f"{name:45} {rows[name]['seconds']:.3f} s", [x >> 20 for x in rows[name]["anonymous"]], flush=True
        )
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    system = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }
    result = {
        "bytes": nbytes,
        "world": options.world,
        "rounds": options.rounds,
        "system": system,
        "rows": rows,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
