"""Files that change, processes that fork, descriptors that run out, memory that must not grow."""

import gc
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safemap import ClosedMapError, DiskMap, FileChangedError, SafemapError, _contents, _torch_file
from safemap._file import File, OpenFiles
from safemap.testing import assert_same
from torch import Tensor

MODES = [{}, {"mmap": True}, {"torch_dtype": torch.float64}, {"threads": 3}]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("name", ["blocks.0.weight", "embedding"])
def test_truncated_after_opening(name: str, options: dict, path: str) -> None:
    """An error, not a SIGBUS and not zeros."""
    disk_map = DiskMap(path, **options)
    os.truncate(path, disk_map.info(name).offset + 10)
    with pytest.raises(FileChangedError) as error:
        disk_map[name]
    assert str(error.value).startswith(f"{path}: ")
    assert "it had" in str(error.value)
    with pytest.raises(FileChangedError):
        disk_map.slice(name)[1:3]


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("name", ["blocks.0.weight", "embedding"])
def test_edited_in_place(name: str, options: dict, path: str) -> None:
    disk_map = DiskMap(path, **options)
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x00")
    os.utime(path, ns=(1, 1))  # whatever the resolution of the clock
    with pytest.raises(FileChangedError) as error:
        disk_map[name]
    assert str(error.value) == (
        f"{path}: changed after it was opened: it was written to. Open a new map once the file is complete."
    )


@pytest.mark.parametrize("options", MODES, ids=str)
def test_replaced_by_renaming(
    options: dict, path: str, tensors: dict[str, Tensor], tmp_path: Path, save
) -> None:
    """The opened file is served on; a new map sees the new one."""
    disk_map = DiskMap(path, **options)
    other = save(tmp_path / "other", {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    os.replace(other, path)
    expected = tensors["embedding"].to(options.get("torch_dtype", torch.bfloat16))
    assert_same(disk_map["embedding"], expected)
    assert not DiskMap(path, **options)["embedding"].any()


def test_deleted_while_open(path: str, tensors: dict[str, Tensor]) -> None:
    disk_map = DiskMap(path)
    os.unlink(path)
    assert_same(disk_map["embedding"], tensors["embedding"])


def test_a_header_that_changes_while_it_is_read_is_noticed(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safemap import _contents

    original = _contents.read_bytes

    def slow(fd: int, nbytes: int, offset: int) -> bytes:
        data = original(fd, nbytes, offset)
        os.utime(path, ns=(1, 1))
        return data

    monkeypatch.setattr(_contents, "read_bytes", slow)
    with pytest.raises(FileChangedError):
        DiskMap(path)


# ---------------------------------------------------------------------- descriptors


def test_dropping_a_map_closes_its_files(path: str) -> None:
    gc.collect()
    before = open_files()
    disk_map = DiskMap(path)
    disk_map["embedding"]
    assert open_files() == before + 1
    del disk_map
    assert open_files() == before


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"123")
    gc.collect()
    before = open_files()
    with pytest.raises(SafemapError):
        DiskMap(tmp_path / "bad.safetensors")
    gc.collect()
    assert open_files() == before


MANY = """
import resource, sys, torch
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from safemap import DiskMap
from pathlib import Path
disk_map = DiskMap(Path(sys.argv[1]) / "*.safetensors")
assert len(disk_map) == 400
for _ in range(2):
    for name in disk_map:
        assert disk_map[name].item() == int(name), name
"""


@pytest.mark.slow
def test_400_shards_under_a_limit_of_256_descriptors(tmp_path: Path, save) -> None:
    for number in range(400):
        save(tmp_path / f"{number:03}.safetensors", {str(number): torch.tensor(number)})
    subprocess.run([sys.executable, "-c", MANY, str(tmp_path)], check=True, timeout=120)


MANY_MAPPED = """
import errno, resource, sys, torch
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from safemap import DiskMap
from pathlib import Path
disk_map = DiskMap(Path(sys.argv[1]) / "*.safetensors", mmap=True)
try:
    views = {name: disk_map[name] for name in disk_map}
except OSError as error:
    assert sys.version_info < (3, 13)
    assert error.errno == errno.EMFILE
    assert error.filename.startswith(sys.argv[1])
    assert "Raise it (`ulimit -n`), or read with mmap=False" in str(error), error
else:
    assert sys.version_info >= (3, 13)
    assert all(view.item() == int(name) for name, view in views.items())
"""


@pytest.mark.slow
def test_more_mapped_files_than_descriptors(tmp_path: Path, save) -> None:
    for number in range(80):
        save(tmp_path / f"{number:03}.safetensors", {str(number): torch.tensor(number)})
    subprocess.run([sys.executable, "-c", MANY_MAPPED, str(tmp_path)], check=True, timeout=120)


@pytest.fixture
def two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> OpenFiles:
    from safemap import _file

    limited = OpenFiles(2)
    monkeypatch.setattr(_file, "_OPEN_FILES", limited)
    return limited


def test_evicted_files_are_opened_again(two_at_a_time: OpenFiles, tmp_path: Path, save) -> None:
    paths = [save(tmp_path / f"{i}.safetensors", {str(i): torch.tensor(i)}) for i in range(5)]
    disk_map = DiskMap(paths)
    for _ in range(3):
        for name in disk_map:
            assert disk_map[name].item() == int(name)
            assert len(two_at_a_time) <= 2


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_files_are_evicted_while_another_is_opened(
    suffix: str, two_at_a_time: OpenFiles, tmp_path: Path, save, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [save(tmp_path / f"{i}.safetensors", {"a": torch.tensor(i)}) for i in range(5)]
    path = str(tmp_path / f"m.{suffix}")
    (torch.save if suffix == "pth" else lambda t, to: save(to, t))({"t": torch.ones(3)}, path)
    opened: list[File] = []

    def crowded(function):
        def call(*given):
            opened[:] = [File(other) for other in others]  # as other threads may
            return function(*given)

        return call

    monkeypatch.setattr(_contents, "read_bytes", crowded(_contents.read_bytes))
    monkeypatch.setattr(_torch_file, "read_bytes", crowded(_torch_file.read_bytes))
    monkeypatch.setattr(os, "dup", crowded(os.dup))
    assert_same(DiskMap(path)["t"], torch.ones(3))


def test_an_evicted_file_that_was_replaced_is_refused(two_at_a_time: OpenFiles, tmp_path: Path, save) -> None:
    paths = [save(tmp_path / f"{i}.safetensors", {str(i): torch.tensor(i)}) for i in range(4)]
    disk_map = DiskMap(paths)
    os.replace(save(tmp_path / "new", {"0": torch.tensor(9)}), paths[0])
    with pytest.raises(FileChangedError, match="another file has taken its place"):
        disk_map["0"]
    os.unlink(paths[1])
    for name in ("2", "3"):
        disk_map[name]
    with pytest.raises(FileNotFoundError, match="no such file"):
        disk_map["1"]


def test_eviction_while_threads_read(two_at_a_time: OpenFiles, tmp_path: Path, save) -> None:
    paths = [save(tmp_path / f"{i}.safetensors", {str(i): torch.full((2000,), float(i))}) for i in range(6)]
    disk_map = DiskMap(paths)
    wrong: list[object] = []

    def read(seed: int) -> None:
        for step in range(200):
            name = str((seed * 7 + step) % 6)
            try:
                if not torch.equal(disk_map[name], torch.full((2000,), float(name))):
                    wrong.append(name)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_closing_while_threads_read(path: str, tensors: dict[str, Tensor]) -> None:
    """Each read ends with the tensor or with ClosedMapError."""
    for _ in range(20):
        disk_map = DiskMap(path)
        started, wrong = threading.Barrier(4), []

        def read(disk_map=disk_map, started=started, wrong=wrong) -> None:
            started.wait()
            try:
                for _ in range(50):
                    if not torch.equal(disk_map["blocks.0.weight"], tensors["blocks.0.weight"]):
                        wrong.append("values")
            except ClosedMapError:
                pass
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        started.wait()
        disk_map.close()
        for thread in threads:
            thread.join()
        assert wrong == []


# ---------------------------------------------------------------------- fork, pickle


def in_child(check) -> int:
    """Run *check* in a forked child; return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the child has none of torch's threads
            check()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork(path: str, tmp_path: Path, tensors: dict[str, Tensor], save) -> None:
    large = torch.arange(3_000_000)
    disk_map = DiskMap([path, save(tmp_path / "large.safetensors", {"large": large})], threads=2)
    disk_map["large"]  # starts the threads, which the child does not have

    def check() -> None:
        assert_same(disk_map["large"], large)
        assert_same(disk_map["blocks.0.weight"], tensors["blocks.0.weight"])
        disk_map.close()

    assert in_child(check) == 0
    assert_same(disk_map["large"], large)  # the child's close is the child's


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_another_thread_holds_the_locks(tmp_path: Path, save) -> None:
    """The child has no thread that would open them again."""
    large = torch.arange(3_000_000)
    disk_map = DiskMap(save(tmp_path / "large.safetensors", {"large": large}), threads=1)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with disk_map._reader.pool._lock:
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        assert in_child(lambda: assert_same(disk_map["large"], large)) == 0
    finally:
        done.set()
    thread.join()


def test_pickle(path: str, tensors: dict[str, Tensor]) -> None:
    for options in (*MODES, {"state_dict_converter": lambda sd: {f"x.{k}": v for k, v in sd.items()}}):
        disk_map = DiskMap(path, **options)
        copy = pickle.loads(pickle.dumps(disk_map))
        assert list(copy) == list(disk_map)
        assert copy.files == disk_map.files
        assert dict(copy.metadata) == dict(disk_map.metadata)
        for name in copy:
            if "spectrum" not in name:
                assert_same(copy[name], disk_map[name])


def test_pickle_refuses_changed_files(path: str, tmp_path: Path, save) -> None:
    pickled = pickle.dumps(DiskMap(path))
    save(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    with pytest.raises(FileChangedError, match="changed since the map was pickled"):
        pickle.loads(pickled)


def test_pickle_of_a_closed_map(path: str) -> None:
    disk_map = DiskMap(path)
    disk_map.close()
    with pytest.raises(ClosedMapError):
        pickle.dumps(disk_map)


# ---------------------------------------------------------------------- memory


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"torch_dtype": torch.float32}], ids=str)
def test_no_growth_over_200_000_gets(options: dict, tmp_path: Path, save) -> None:
    path = save(tmp_path / "m.safetensors", {str(i): torch.full((64,), float(i)).half() for i in range(100)})
    disk_map = DiskMap(path, **options)
    names = list(disk_map)
    gets = 200_000 if not options else 40_000
    for name in names * 20:
        disk_map[name]
    before = resident()
    for _ in range(gets // len(names)):
        for name in names:
            disk_map[name]
    assert resident() - before < 4 << 20


LARGER_THAN_MEMORY = """
import os, resource, sys, torch
path = sys.argv[1]
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from safemap import DiskMap
with DiskMap(path) as disk_map:
    assert disk_map.nbytes("huge") == 1 << 40
    assert disk_map["small"].tolist() == [0, 0, 0, 0]
    assert disk_map.slice("huge")[-4:].tolist() == [0, 0, 0, 0]
"""


@pytest.mark.slow
def test_a_file_larger_than_memory_opens(tmp_path: Path) -> None:
    """A sparse file of a terabyte, in a process that may have 8 GB of address space."""
    from safemap.testing import safetensors_bytes

    rows = {
        "huge": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]},
        "small": {"dtype": "U8", "shape": [4], "data_offsets": [1 << 40, (1 << 40) + 4]},
    }
    path = tmp_path / "huge.safetensors"
    head = safetensors_bytes(rows)
    path.write_bytes(head)
    os.truncate(path, len(head) + (1 << 40) + 4)
    subprocess.run([sys.executable, "-c", LARGER_THAN_MEMORY, str(path)], check=True, timeout=120)


WITHOUT_NUMPY = """
import sys, warnings
sys.modules["numpy"] = None  # importing it raises ImportError
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
from safemap import DiskMap, load_state_dict
path, pickled = sys.argv[1:]
for dtype in (None, torch.float32):
    for source in (path, pickled):
        disk_map = DiskMap(source, torch_dtype=dtype)
        assert disk_map["embedding"].shape == (1200, 1000)
        assert disk_map.slice("embedding")[5:9, :10].shape == (4, 10)
        disk_map.read_into("embedding", torch.empty(1200, 1000))
assert len(load_state_dict(path)) == 11
"""


@pytest.mark.slow
def test_numpy_is_not_needed(path: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"embedding": tensors["embedding"]}, tmp_path / "m.pth")
    command = [sys.executable, "-c", WITHOUT_NUMPY, path, str(tmp_path / "m.pth")]
    subprocess.run(command, check=True, timeout=120)
