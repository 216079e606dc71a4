"""What is measured.  Every job yields ``(case, contender, seconds, nbytes)`` for one round."""

import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import checkpoints
import peers
import system
import torch

Sample = tuple[str, str, float, int]
Contenders = dict[str, Callable[[], float]]


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def round_of(case: str, contenders: Contenders, nbytes: int, number: int) -> Iterator[Sample]:
    """Run every contender once, each round in another order; one that fails is left out with its reason."""
    names = list(contenders)
    random.Random(number).shuffle(names)
    for name in names:
        try:
            yield case, name, contenders[name](), nbytes
        except Exception as error:
            yield case, name, float("nan"), nbytes
            print(f"    {name}: {type(error).__name__}: {error}"[:200])


class Job:
    """Its files, opened once for all rounds."""

    def __init__(self, folder: Path, gigabytes: float) -> None:
        self.folder, self.gigabytes = folder, gigabytes

    def dit(self) -> list[str]:
        return checkpoints.dit(self.folder, self.gigabytes)

    def spans(self, paths: list[str], names: list[str]) -> list[tuple[str, int, int]]:
        from safemap import DiskMap

        with DiskMap(paths) as disk_map:
            infos = [disk_map.info(name) for name in names]
        return [(info.file, info.offset or 0, info.nbytes) for info in infos]


class Open(Job):
    """From nothing to the first tensor."""

    def rounds(self, number: int) -> Iterator[Sample]:
        one = checkpoints.of_one_size(self.folder, 1)
        many = checkpoints.many_names(self.folder)
        for case, paths in (("one file", [one]), ("4 shards", self.dit()), ("50,000 tensors", [many])):
            name = next(checkpoints.names_in_file_order(paths))
            contenders = {
                peer: lambda opened=opened, paths=paths, name=name: timed(
                    lambda: self.first(opened, paths, name)
                )
                for peer, opened in peers.LAZY.items()
                if not (peer in ("torch.load mmap", "tensorizer lazy") and case == "50,000 tensors")
            }
            yield from round_of(case, contenders, 0, number)

    @staticmethod
    def first(opened: Callable, paths: list[str], name: str) -> None:
        with opened(paths) as get:
            get(name)


class OneTensor(Job):
    """One tensor by size, file in the page cache; its floors are plain copies into touched memory."""

    def rounds(self, number: int) -> Iterator[Sample]:
        for megabytes in checkpoints.SIZE_CLASSES_MB:
            path = checkpoints.of_one_size(self.folder, megabytes)
            system.warm([path])
            names = list(checkpoints.names_in_file_order([path]))[:200]
            spans = self.spans([path], names)
            nbytes = spans[0][2]
            contenders: Contenders = {}
            opened = {peer: open_peer([path]) for peer, open_peer in peers.LAZY.items()}
            gets = {}
            for peer, context in opened.items():
                try:
                    gets[peer] = context.__enter__()
                except Exception as error:
                    print(f"    {peer}: {error}"[:200])
            for peer, get in gets.items():
                contenders[peer] = functools.partial(self.per_call, get, names)
            source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
            view = memoryview(target.numpy())
            fd = os.open(path, os.O_RDONLY)
            offsets = [offset for _, offset, _ in spans]
            contenders["floor: memcpy"] = functools.partial(
                self.per_call, target.copy_, [source] * len(names)
            )
            contenders["floor: preadv"] = functools.partial(
                self.per_call, functools.partial(os.preadv, fd, [view]), offsets
            )
            yield from round_of(f"{megabytes:g} MB", contenders, nbytes, number)
            os.close(fd)
            for peer in gets:
                opened[peer].__exit__(None, None, None)

    @staticmethod
    def per_call(function: Callable, arguments: list) -> float:
        """Seconds of one call; no result is kept, so that memory can be used again."""

        def calls() -> None:
            for argument in arguments:
                function(argument)

        return timed(calls) / len(arguments)


class Sweep(Job):
    """Every tensor once, or 5% of them; files in the page cache or not."""

    def __init__(self, folder: Path, gigabytes: float, *, cold: bool) -> None:
        super().__init__(folder, gigabytes)
        self.cold = cold

    def rounds(self, number: int) -> Iterator[Sample]:
        paths = self.dit()
        in_order = list(checkpoints.names_in_file_order(paths))
        shuffled = random.Random(1).sample(in_order, len(in_order))
        subset = shuffled[: max(1, len(in_order) // 20)]
        state = "cold" if self.cold else "warm"
        for label, names in (("file order", in_order), ("random order", shuffled), ("5% random", subset)):
            spans = self.spans(paths, names)
            nbytes = sum(span[2] for span in spans)
            contenders = {
                peer: lambda opened=opened, names=names: self.timed_sweep(opened, paths, names)
                for peer, opened in peers.LAZY.items()
            }
            if label == "file order" and not self.cold:
                for peer, sweep in peers.WHOLE.items():
                    contenders[peer] = lambda sweep=sweep: timed(lambda: sweep(paths))
            if self.cold:
                contenders["floor: O_DIRECT"] = lambda spans=spans: system.direct_seconds(spans)
            else:
                contenders["floor: preadv"] = lambda spans=spans: self.preadv_seconds(spans)
                contenders["safemap read_into"] = lambda names=names: self.read_into_seconds(paths, names)
            yield from round_of(f"{state}, {label}", contenders, nbytes, number)

    def timed_sweep(self, opened: Callable, paths: list[str], names: list[str]) -> float:
        """Opening is included: it is part of the first sweep."""
        if self.cold:
            system.evict(paths)
        else:
            system.warm(paths)

        def sweep() -> None:
            with opened(paths) as get:
                for name in names:
                    get(name)

        return timed(sweep)

    @staticmethod
    def preadv_seconds(spans: list[tuple[str, int, int]]) -> float:
        target = torch.ones(max(nbytes for _, _, nbytes in spans), dtype=torch.uint8)
        view = memoryview(target.numpy())
        fds = {path: os.open(path, os.O_RDONLY) for path, _, _ in spans}
        seconds = timed(lambda: [os.preadv(fds[path], [view[:n]], offset) for path, offset, n in spans])
        for fd in fds.values():
            os.close(fd)
        return seconds

    @staticmethod
    def read_into_seconds(paths: list[str], names: list[str]) -> float:
        from safemap import DiskMap

        with DiskMap(paths, threads=torch.get_num_threads()) as disk_map:
            infos = {name: disk_map.info(name) for name in names}
            target = torch.ones(max(info.nbytes for info in infos.values()), dtype=torch.uint8)

            def sweep() -> None:
                for name, info in infos.items():
                    disk_map.read_into(name, target[: info.nbytes].view(info.dtype).view(info.shape))

            return timed(sweep)


class Kept(Job):
    """Every tensor once, and all of them kept, as when a model is loaded: memory is new to the process."""

    def rounds(self, number: int) -> Iterator[Sample]:
        paths = self.dit()
        names = list(checkpoints.names_in_file_order(paths))
        nbytes = sum(span[2] for span in self.spans(paths, names))
        contenders = {
            peer: lambda opened=opened: self.load(opened, paths, names)
            for peer, opened in peers.LAZY.items()
            if peer != "safemap mmap=True"
        }
        contenders["safemap, all threads"] = lambda: self.load(peers.safemap_all_threads, paths, names)
        yield from round_of("kept, file order", contenders, nbytes, number)

    @staticmethod
    def load(opened: Callable, paths: list[str], names: list[str]) -> float:
        system.warm(paths)
        kept = []

        def load() -> None:
            with opened(paths) as get:
                kept.extend(get(name) for name in names)

        return timed(load)


class Used(Job):
    """Every tensor once, and every byte of it read by a sum: what a view saves, and what it only puts off."""

    def rounds(self, number: int) -> Iterator[Sample]:
        paths = self.dit()
        names = list(checkpoints.names_in_file_order(paths))
        nbytes = sum(span[2] for span in self.spans(paths, names))
        contenders = {
            peer: functools.partial(self.sweep, opened, paths, names)
            for peer, opened in (
                ("safemap", peers.safemap),
                ("safemap mmap=True", lambda paths: peers.safemap(paths, mmap=True)),
                ("DiffSynth DiskMap", peers.diffsynth),
                ("safe_open + clone", peers.safe_open),
                ("safe_open views", peers.safe_open_views),
            )
        }
        yield from round_of("warm, file order, summed", contenders, nbytes, number)

    @staticmethod
    def sweep(opened: Callable, paths: list[str], names: list[str]) -> float:
        system.warm(paths)

        def sweep() -> None:
            with opened(paths) as get:
                for name in names:
                    tensor = get(name).view(-1)
                    (tensor.view(torch.int64) if tensor.nbytes % 8 == 0 else tensor).sum()

        return timed(sweep)


class Casts(Job):
    """A large tensor in another dtype than it is stored in."""

    def rounds(self, number: int) -> Iterator[Sample]:
        cases = (
            ("fp8 to bf16", checkpoints.eight_bits(self.folder), torch.bfloat16),
            ("bf16 to fp32", checkpoints.of_one_size(self.folder, 56), torch.float32),
        )
        for case, path, dtype in cases:
            system.warm([path])
            names = list(checkpoints.names_in_file_order([path]))[:4]
            nbytes = sum(span[2] for span in self.spans([path], names))
            contenders: Contenders = {}
            for peer, opened in (("safemap", peers.safemap), ("DiffSynth DiskMap", peers.diffsynth)):
                contenders[peer] = lambda opened=opened, path=path, dtype=dtype, names=names: self.sweep(
                    opened, path, dtype, names
                )
            yield from round_of(case, contenders, nbytes, number)

    @staticmethod
    def sweep(opened: Callable, path: str, dtype: torch.dtype, names: list[str]) -> float:
        with opened([path], torch_dtype=dtype) as get:
            return OneTensor.per_call(get, names) * len(names)


class TwoThreads(Job):
    """Two threads share one map and read every other tensor each."""

    def rounds(self, number: int) -> Iterator[Sample]:
        paths = self.dit()
        names = list(checkpoints.names_in_file_order(paths))
        nbytes = sum(span[2] for span in self.spans(paths, names))
        chosen = ("safemap", "safemap mmap=True", "DiffSynth DiskMap", "safe_open + clone")
        contenders = {peer: lambda peer=peer: self.sweep(peers.LAZY[peer], paths, names) for peer in chosen}
        yield from round_of("warm, file order", contenders, nbytes, number)

    @staticmethod
    def sweep(opened: Callable, paths: list[str], names: list[str]) -> float:
        system.warm(paths)
        with opened(paths) as get:

            def work(part: list[str]) -> None:
                for name in part:
                    get(name)

            threads = [threading.Thread(target=work, args=(names[i::2],)) for i in range(2)]

            def run() -> None:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

            return timed(run)


JOBS: dict[str, Callable[[Path, float], Job]] = {
    "open": Open,
    "one-tensor": OneTensor,
    "sweep-warm": lambda folder, gigabytes: Sweep(folder, gigabytes, cold=False),
    "sweep-cold": lambda folder, gigabytes: Sweep(folder, gigabytes, cold=True),
    "sweep-used": Used,
    "kept": Kept,
    "casts": Casts,
    "two-threads": TwoThreads,
}
