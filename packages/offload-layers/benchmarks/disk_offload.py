"""What does it cost to keep the weights of a real architecture away from the compute device?

``python disk_offload.py`` runs every subject in a process of its own, which holds the plain model as well and
alternates the two: the ratio of such a pair does not move with the machine's speed. Memory is measured in a
second process that holds the subject alone. Peers that are not installed are left out and named.

Needs diffusers and safemap; measures accelerate and DiffSynth-Studio where they are installed.
"""

import argparse
import contextlib
import ctypes
import datetime
import importlib
import importlib.metadata
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "safemap" / "benchmarks"))
from owned_memory import owned_memory, use_free_memory

CONFIG = {"num_layers": 12, "attention_head_dim": 128, "num_attention_heads": 12, "joint_attention_dim": 3584}
TOKENS = {  # side of the image in tokens, text tokens
    "small": (4, 64),
    "moderate": (32, 64),
    "few": (3, 8),
}
WEIGHTS = {"dtype": torch.bfloat16}
SHARD_NBYTES = 600_000_000
PIECE = 8 << 20
SMALL_PIECE = 2 << 20
ROOM = 8 << 30  # bytes: for the checkpoint in the page cache, the plain model and what a subject holds
QUIET = 0.05  # of the time of all cores
SETTLED_S = 1.5  # until nothing of a subject is under way that the plain model could feel
RESTING = ("offload", "onload", "preparing")


def use(dtype: torch.dtype) -> None:
    """Measure in this dtype, with as many layers as make the same bytes."""
    CONFIG["num_layers"] = 12 * torch.bfloat16.itemsize // dtype.itemsize
    WEIGHTS["dtype"] = dtype


def model_class() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel


def skeleton() -> nn.Module:
    from skipinit import skip_model_initialization

    with skip_model_initialization():
        return model_class()(**CONFIG).eval()


def inputs(model: Any, tokens: str) -> dict[str, Any]:
    side, text = TOKENS[tokens]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, side * side, model.config.in_channels, generator=generator)
    texts = torch.randn(1, text, CONFIG["joint_attention_dim"], generator=generator)
    return {
        "hidden_states": images.to(WEIGHTS["dtype"]),
        "encoder_hidden_states": texts.to(WEIGHTS["dtype"]),
        "encoder_hidden_states_mask": torch.ones(1, text, dtype=torch.bool),
        "timestep": torch.tensor([0.5], dtype=WEIGHTS["dtype"]),
        "img_shapes": [[(1, side, side)]],
        "return_dict": False,
    }


def make_checkpoint(folder: Path) -> None:
    """Write the weights in shards, unless they are there."""
    from safetensors.torch import save_file

    if (folder / "whole").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    shards = 0
    for name, parameter in [*skeleton().state_dict().items(), (None, None)]:
        if name is not None and parameter is not None:
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            shard[name] = values.to(WEIGHTS["dtype"])
        if shard and (name is None or sum(t.nbytes for t in shard.values()) > SHARD_NBYTES):
            save_file(shard, folder / f"model-{shards}.safetensors")
            shard, shards = {}, shards + 1
    (folder / "whole").touch()


def files(folder: Path) -> list[str]:
    return sorted(str(file) for file in folder.glob("*.safetensors"))


# -- subjects -----------------------------------------------------------------------------------------


def plain(folder: Path) -> nn.Module:
    from safemap import load_state_dict

    model = skeleton()
    model.load_state_dict(load_state_dict(files(folder)), assign=True)
    return model


def plain_mapped(folder: Path) -> nn.Module:
    """The plain model on views of the page cache: all that it takes of its own is for activations."""
    from safemap import DiskMap

    model = skeleton()
    model.load_state_dict(DiskMap(files(folder), mmap=True).tensors(), assign=True)
    return model


def module_map(
    linear: type, module: type, own: type, of: nn.Module | None = None
) -> dict[type[nn.Module], type]:
    """Every module with parameters of its own, for our layer classes or those of DiffSynth-Studio."""
    faces: dict[type[nn.Module], type] = {nn.Linear: linear}
    for part in (of or skeleton()).modules():
        if type(part) not in faces and next(part.parameters(recurse=False), None) is not None:
            faces[type(part)] = own if any(True for _ in part.children()) else module
    return faces


def on_disk(dtype: torch.dtype) -> dict[str, Any]:
    config: dict[str, Any] = {f"{role}_{what}": "disk" for role in RESTING for what in ("dtype", "device")}
    return config | {"computation_dtype": dtype, "computation_device": "cpu"}


def ours(folder: Path, *, mmap: bool) -> nn.Module:
    import offload_layers as layers
    from safemap import DiskMap

    faces = module_map(layers.AutoWrappedLinear, layers.AutoWrappedModule, layers.AutoWrappedNonRecurseModule)
    source = DiskMap(files(folder), mmap=mmap)
    return layers.enable_vram_management(skeleton(), faces, on_disk(WEIGHTS["dtype"]), None, source)


class WithReading(nn.Module):
    """The plain model, and the same bytes are read: what reading costs at the very least.

    Either one thread reads while the model computes. Or what is not in the page cache comes there while it
    computes, and as many threads as compute read it afterwards: one tensor after the other to where the
    largest has room, since each has to be there as a whole when it is computed with.
    """

    def __init__(self, folder: Path, *, beside: bool) -> None:
        from safemap import DiskMap

        super().__init__()
        self.model = plain(folder)
        self.config = self.model.config
        self.folder = folder
        self.beside = beside
        self.source = DiskMap(files(folder))
        self.tensors = [info for name in self.source if (info := self.source.info(name)).offset is not None]
        self.room = mmap.mmap(-1, max(info.nbytes for info in self.tensors))
        self.room.madvise(mmap.MADV_HUGEPAGE)
        self.room[:] = bytes(len(self.room))

    def read_tensors(self, threads: int) -> None:
        """Read the checkpoint in pieces, as fast as so many threads can."""
        room = memoryview(self.room)
        opened = {path: os.open(path, os.O_RDONLY) for path in self.source.files}
        pieces = iter(
            [
                (
                    opened[info.file],
                    [room[start : min(start + SMALL_PIECE, info.nbytes)]],
                    info.offset + start,
                )
                for info in self.tensors
                for start in range(0, info.nbytes, SMALL_PIECE)
            ]
        )

        def work() -> None:
            for piece in pieces:
                os.preadv(*piece)

        others = [threading.Thread(target=work) for _ in range(threads - 1)]
        for thread in others:
            thread.start()
        work()
        for thread in others:
            thread.join()
        for descriptor in opened.values():
            os.close(descriptor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.beside:
            self.source.prefetch(self.source)
            output = self.model(*args, **kwargs)
            self.read_tensors(torch.get_num_threads())
            return output
        thread = threading.Thread(target=read_all, args=(self.folder, 1))
        thread.start()
        try:
            return self.model(*args, **kwargs)
        finally:
            thread.join()


def half_resident(folder: Path) -> nn.Module:
    import offload_layers
    from safemap import DiskMap

    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    source = DiskMap(files(folder), mmap=True)
    return offload_layers.offload(skeleton(), device="cpu", ram=nbytes // 2, source=source).model


def diffsynth_layers() -> Any:
    """The layers of DiffSynth-Studio, without what its ``__init__`` imports: pipelines, torchvision ..."""
    try:
        root = Path(str(importlib.metadata.distribution("diffsynth").locate_file("diffsynth")))
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("diffsynth is not installed") from error
    for name, path in (("diffsynth", root), ("diffsynth.core", root / "core")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    return importlib.import_module("diffsynth.core.vram.layers")


def diffsynth(folder: Path) -> nn.Module:
    layers = diffsynth_layers()
    faces = module_map(layers.AutoWrappedLinear, layers.AutoWrappedModule, layers.AutoWrappedNonRecurseModule)
    disk_map = layers.DiskMap(files(folder), "cpu")
    with layers.skip_model_initialization():
        model = model_class()(**CONFIG).eval()
    return layers.enable_vram_management(model, faces, on_disk(WEIGHTS["dtype"]), None, disk_map)  # type: ignore[no-any-return]


def accelerate(folder: Path, *, disk: bool) -> nn.Module:
    from accelerate import cpu_offload, disk_offload

    model = plain(folder)
    if not disk:
        return cpu_offload(model, execution_device=torch.device("cpu"))  # type: ignore[no-any-return]
    return disk_offload(model, str(folder / "accelerate"), execution_device=torch.device("cpu"))  # type: ignore[no-any-return]


def diffusers(folder: Path, *, level: str, disk: bool) -> nn.Module:
    from diffusers.hooks import apply_group_offloading

    model = plain(folder)
    target = folder / f"diffusers-{level}"
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=f"{level}_level",
        num_blocks_per_group=1 if level == "block" else None,
        offload_to_disk_path=str(target) if disk else None,
    )
    return model


SUBJECTS: dict[str, Callable[[Path], nn.Module]] = {
    "floor: plain, then reading": lambda f: WithReading(f, beside=False),
    "floor of memory: plain, mapped": plain_mapped,
    "plain beside a reader": lambda f: WithReading(f, beside=True),
    "offload-layers, disk, mmap": lambda f: ours(f, mmap=True),
    "offload-layers, disk, read": lambda f: ours(f, mmap=False),
    "offload-layers, half resident": half_resident,
    "DiffSynth-Studio, disk": diffsynth,
    "accelerate, cpu_offload": lambda f: accelerate(f, disk=False),
    "accelerate, disk_offload": lambda f: accelerate(f, disk=True),
    "diffusers, block, host": lambda f: diffusers(f, level="block", disk=False),
    "diffusers, block, disk": lambda f: diffusers(f, level="block", disk=True),
    "diffusers, leaf, disk": lambda f: diffusers(f, level="leaf", disk=True),
}


# -- one measurement, in a process of its own ----------------------------------------------------------


def memory() -> dict[str, int]:
    """Resident bytes of this process: its own, and of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile", "VmHWM")}


class PeakOfAnonymous(threading.Thread):
    """Samples what the process holds of its own, every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.005):
            self.peak = max(self.peak, memory()["RssAnon"])

    def __enter__(self) -> "PeakOfAnonymous":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def unmap(folder: Path) -> None:
    """Let this process' mapped pages of the files go: what is mapped stays in the page cache."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder.resolve()) in line:
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            madvise(start, end - start, mmap.MADV_DONTNEED)


def forget(folder: Path) -> None:
    """Drop the checkpoint, and what peers have made of it, from the page cache."""
    unmap(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_all(folder: Path, threads: int = 4) -> None:
    """The disk's floor: the same bytes into one buffer for each thread, in large pieces."""
    pieces = []
    for file in folder.glob("*.safetensors"):
        pieces += [(file, start) for start in range(0, file.stat().st_size, PIECE)]
    local = threading.local()

    def read(piece: tuple[Path, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(PIECE)
        with piece[0].open("rb", buffering=0) as file:
            os.preadv(file.fileno(), [local.buffer], piece[1])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, pieces))


class Taken(NamedTuple):
    """How long something took, and which part of the cores' time the host of this machine took meanwhile."""

    seconds: float
    stolen: float


def stolen_s() -> float:
    """Seconds of all cores together that the host has taken up to now; 0 where the system does not tell."""
    try:
        columns = Path("/proc/stat").read_text().splitlines()[0].split()
        return int(columns[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def timed(act: Callable[[], object]) -> Taken:
    stolen, start = stolen_s(), time.perf_counter()
    act()
    seconds = time.perf_counter() - start
    return Taken(seconds, (stolen_s() - stolen) / seconds / (os.cpu_count() or 1))


def second_of_two(act: Callable[[], object], before: Callable[[], object] = lambda: None) -> Taken:
    """What *act* takes the second time, with *before* right before each time."""
    for _ in range(2):
        before()
        taken = timed(act)
    return taken


def quiet_rounds(rounds: int, once: Callable[[], list[Taken]]) -> tuple[list[list[float]], int]:
    """Return the seconds of so many rounds, and how many others were left out.

    A round is left out in which the host took more than a few percent of the time of the cores from anything
    that is compared: who waits for a core is then slowed down by others. There are at most three times as
    many rounds as asked for; if too few of those are quiet, the quietest count.
    """
    done: list[list[Taken]] = []

    def noise(taken: list[Taken]) -> float:
        return max(part.stolen for part in taken)

    while len(done) < 3 * rounds and sum(noise(taken) <= QUIET for taken in done) < rounds:
        done.append(once())
    quietest = sorted(done, key=noise)[:rounds]
    return [[part.seconds for part in taken] for taken in quietest], len(done) - rounds


@torch.no_grad()
def measure(subject: str, folder: Path, tokens: str, rounds: int, threads: int, what: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model_class()
    before = memory()["RssAnon"]
    model = SUBJECTS[subject](folder)
    arguments = inputs(model, tokens)
    for _ in range(2):  # in the first forward a model is learned, in the second what stays comes
        model(**arguments)
    if what == "memory":
        first = memory()
        with PeakOfAnonymous() as sampled:
            for _ in range(rounds):
                model(**arguments)
        last = memory()
        return {
            "peak_nbytes": sampled.peak - before,
            "anonymous_nbytes": last["RssAnon"] - before,
            "mapped_nbytes": last["RssFile"],
            "growth_nbytes": last["RssAnon"] - first["RssAnon"],
        }
    reference = plain(folder)
    if what == "cold":
        return cold(model, reference, arguments, folder, rounds)
    expected = reference(**arguments)[0]

    def once() -> list[Taken]:
        time.sleep(SETTLED_S)
        reference(**arguments)
        return [timed(lambda: reference(**arguments)), timed(lambda: model(**arguments))]

    taken, left_out = quiet_rounds(rounds, once)
    ratios = [managed_s / plain_s for plain_s, managed_s in taken]
    return {
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
        "rounds_left_out": left_out,
        "plain_s": statistics.median(plain_s for plain_s, _ in taken),
        "identical": bool(torch.equal(model(**arguments)[0], expected)),
    }


def cold(
    model: nn.Module, reference: nn.Module, arguments: dict[str, Any], folder: Path, rounds: int
) -> dict[str, Any]:
    """A forward with nothing in the page cache, over the slower of computation and disk.

    Each is done twice in a row, and the second counts: what comes first after a pause is slower on a virtual
    machine, be it computation alone.
    """

    def once() -> list[Taken]:
        computing = second_of_two(lambda: reference(**arguments))
        use_free_memory()
        reading = second_of_two(lambda: read_all(folder), before=lambda: forget(folder))
        use_free_memory()
        return [
            second_of_two(lambda: model(**arguments), before=lambda: forget(folder)),
            computing,
            reading,
        ]

    taken, left_out = quiet_rounds(rounds, once)
    ratios = [forward_s / max(others) for forward_s, *others in taken]
    forward_s, compute_s, disk_s = (statistics.median(column) for column in zip(*taken, strict=True))
    return {
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
        "rounds_left_out": left_out,
        "forward_s": forward_s,
        "compute_s": compute_s,
        "disk_s": disk_s,
    }


def in_a_process(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--measure", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]}
    return json.loads(run.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--measure", nargs=7, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept (default: temporary)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of forwards (default: %(default)s)")
    parser.add_argument("--forwards", type=int, default=20, help="that memory is watched in (default: 20)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--tokens", nargs="+", default=list(TOKENS)[:2], choices=list(TOKENS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the weights")
    parser.add_argument("--cold", action="store_true", help="also with nothing in the page cache")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    options = parser.parse_args()
    if options.measure:
        subject, folder, tokens, rounds, threads, what, dtype = options.measure
        use(getattr(torch, dtype))
        found = measure(subject, Path(folder), tokens, int(rounds), int(threads), what)
        print(json.dumps(found))
        return
    use(getattr(torch, options.dtype))
    memory_of_its_own = owned_memory(ROOM) if options.cold else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as scratch, memory_of_its_own:
        folder = options.folder or Path(scratch)
        make_checkpoint(folder)
        rows = []
        cold = [f"{tokens}*" for tokens in options.tokens]
        peaks = [f"peak {tokens[:4]}" for tokens in options.tokens]
        print(line("subject", "threads", *options.tokens, *cold, *peaks, "growth"))
        for subject in options.subjects:
            used = {
                f"{tokens}, memory": in_a_process(
                    [subject, str(folder), tokens, str(options.forwards), "2", "memory", options.dtype]
                )
                for tokens in options.tokens
            }
            for threads in options.threads:
                row = {"subject": subject, "threads": threads, **used}
                for tokens in options.tokens:
                    arguments = [subject, str(folder), tokens, str(options.rounds), str(threads)]
                    row[tokens] = in_a_process([*arguments, "time", options.dtype])
                    if options.cold:
                        row[f"{tokens}, cold"] = in_a_process([*arguments, "cold", options.dtype])
                rows.append(row)
                show(row, options.tokens)
    if options.output:
        machine = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
        text = {
            "date": str(datetime.date.today()),
            "machine": machine,
            "config": CONFIG,
            "dtype": options.dtype,
            "forwards": options.forwards,
            "rows": rows,
        }
        options.output.write_text(json.dumps(text, indent=1))


def line(subject: str, *cells: object) -> str:
    return f"{subject:32}" + "".join(f"{cell!s:>10}" for cell in cells)


def show(row: dict[str, Any], tokens: list[str]) -> None:
    def cell(values: dict[str, Any], key: str, scale: float = 1.0, form: str = ".2f") -> str:
        return format(values[key] / scale, form) if key in values else "-"

    def ratio(name: str) -> str:
        values = row.get(name, {})
        return cell(values, "ratio") + ("" if values.get("identical", True) else "!")

    times = [ratio(t) for t in tokens] + [ratio(f"{t}, cold") for t in tokens]
    used = [row[f"{t}, memory"] for t in tokens]
    peaks = [cell(values, "peak_nbytes", 1e6, ",.0f") for values in used]
    growth = cell(used[0], "growth_nbytes", 1e6, ",.0f")  # of more tokens: what the allocator happens to keep
    print(line(row["subject"], row["threads"], *times, *peaks, growth), flush=True)
    for part, values in row.items():
        if isinstance(values, dict) and "error" in values:
            print(f"    {part}: {values['error']}", flush=True)


if __name__ == "__main__":
    main()
