"""Pages of mapped files: brought in ahead, let go behind, and never a value lost."""

import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safemap import DiskMap, FileChangedError, MissingTensorError, _mapping, _pages, _prefetch
from safemap._file import Descriptor, File
from safemap._parallel import one_by_one
from safemap.testing import assert_same
from torch import Tensor

PAGE = mmap.PAGESIZE
EDGES = 2  # pages of a tensor that others share
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs MADV_POPULATE_READ and /proc")


def resident_pages(tensor: Tensor) -> int:
    """How many pages of a view this process has mapped, as the kernel tells."""
    start = tensor.data_ptr() // PAGE
    stop = -(-(tensor.data_ptr() + tensor.nbytes) // PAGE)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(start * 8)
        entries = pagemap.read((stop - start) * 8)
    return sum(entries[i] >> 7 for i in range(7, len(entries), 8))


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefetch at once instead of in the background."""
    monkeypatch.setattr(_prefetch, "one_by_one", lambda task: task())


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(1000, 1000, generator=generator) for name in "abc"}


@pytest.fixture
def mapped(weights: dict[str, Tensor], tmp_path: Path, save: Callable[..., str]) -> DiskMap:
    return DiskMap(save(tmp_path / "m.safetensors", weights), mmap=True)


@linux
def test_prefetch_maps_every_page(mapped: DiskMap, weights: dict[str, Tensor], now: None) -> None:
    view = mapped["b"]
    mapped.release(["b"])
    assert resident_pages(view) <= EDGES
    mapped.prefetch(["b"])
    assert resident_pages(view) == -(-(view.data_ptr() % PAGE + view.nbytes) // PAGE)
    assert_same(view, weights["b"])


@linux
def test_release_lets_every_page_go_and_values_come_back(mapped: DiskMap, weights: dict[str, Tensor]) -> None:
    views = {name: mapped[name] for name in weights}
    for name, view in views.items():
        assert_same(view, weights[name])
        assert resident_pages(view) > 900
        mapped.release([name])
        assert resident_pages(view) <= EDGES
        assert_same(view, weights[name])


@linux
@pytest.mark.parametrize("index", [0, -1, 500_000, slice(None, None, 5000), slice(None)], ids=str)
def test_release_keeps_what_was_written(index: object, mapped: DiskMap, weights: dict[str, Tensor]) -> None:
    """First page, last page, shared with the neighbours, scattered pages, all pages."""
    views = {name: mapped[name] for name in weights}
    views["b"].view(-1)[index] = 7
    weights["b"].view(-1)[index] = 7
    before = resident_pages(views["b"])
    mapped.release(["a", "b", "c"])
    assert resident_pages(views["b"]) <= before
    for name, view in views.items():
        assert_same(view, weights[name])


@linux
def test_release_reaches_mappings_that_were_renewed(tmp_path: Path, weights: dict[str, Tensor], save) -> None:
    disk_map = DiskMap(save(tmp_path / "m.safetensors", weights), mmap=True, buffer_size=10)
    first, second = disk_map["a"], disk_map["a"]
    assert first.data_ptr() != second.data_ptr()
    assert first.sum() == second.sum()
    disk_map.release(["a"])
    assert max(resident_pages(first), resident_pages(second)) <= EDGES


@linux
def test_a_thread_may_write_to_the_neighbours_of_what_is_released(
    mapped: DiskMap, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    views = {name: mapped[name] for name in weights}
    own = _pages._written

    def written(address: int, pages: int) -> Tensor:
        found = own(address, pages)
        for name, index in (("a", -1), ("c", 0)):  # too late to be found
            views[name].view(-1)[index] = weights[name].view(-1)[index] = 7
        return found

    monkeypatch.setattr(_pages, "_written", written)
    mapped.release(["b"])
    for name, view in views.items():
        assert_same(view, weights[name])


@linux
def test_mappings_end_with_their_views(mapped: DiskMap) -> None:
    view = mapped["a"]
    alive = next(iter(mapped._reader.mappings._alive.values()))
    mapped._reader.mappings.drop()
    assert len(alive) == 1
    del view
    assert len(alive) == 0


@linux
def test_nothing_is_dropped_where_the_kernel_does_not_tell(
    mapped: DiskMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: int, pages: int) -> Tensor:
        raise PermissionError("no pagemap")

    view = mapped["a"]
    view.zero_()
    monkeypatch.setattr(_pages, "_written", refuse)
    mapped.release(["a"])
    assert not view.any()
    assert resident_pages(view) > 900


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise")
def test_older_kernels_are_asked_for_the_page_cache(
    mapped: DiskMap, now: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(_pages, "_madvise", lambda address, length, advice: -1)  # EINVAL
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append(length))
    mapped.prefetch(["a"])
    assert sum(asked) == 4_000_000


def test_without_the_system_call_both_do_nothing_and_values_are_right(
    mapped: DiskMap, weights: dict[str, Tensor], now: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pages, "_madvise", None)
    mapped.prefetch(weights)
    view = mapped["a"]
    view[0] = 1
    weights["a"][0] = 1
    mapped.release(weights)
    assert_same(view, weights["a"])


@linux
def test_prefetch_of_a_truncated_file_kills_nothing(
    mapped: DiskMap, now: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check before mapping sees a truncation; one that happens after the check must be survived too."""
    view = mapped["a"]
    monkeypatch.setattr("safemap._file.File.check_unchanged", lambda self, descriptor: None)
    os.truncate(tmp_path / "m.safetensors", PAGE)
    mapped.prefetch(["b", "c"])
    mapped.release(["b", "c"])
    del view


@pytest.mark.parametrize("options", [{}, {"mmap": True}], ids=str)
def test_hints_for_every_kind_of_tensor(options, path: str, tensors: dict[str, Tensor], now: None) -> None:
    disk_map = DiskMap(path, **options)
    for _ in range(2):
        disk_map.prefetch(tensors)
        found = dict(disk_map)
        disk_map.release(tensors)
        for name, tensor in tensors.items():
            assert_same(found[name], tensor)
    with pytest.raises(MissingTensorError):
        disk_map.release(["nothing"])


def test_computed_tensors_are_read_not_mapped(
    path: str, tensors: dict[str, Tensor], now: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not come from the mapping, so mapping their sources would only take memory."""

    def refuse(*_: object) -> bool:
        raise AssertionError("mapped")

    disk_map = DiskMap(path, mmap=True, state_dict_converter=lambda sd: {"two": sd["embedding"] * 2})
    monkeypatch.setattr("safemap._mapping.bring_in", refuse)
    disk_map.prefetch(["two"])
    disk_map.release(["two"])
    assert_same(disk_map["two"], tensors["embedding"] * 2)


@linux
def test_what_was_brought_in_is_not_asked_for_again(mapped: DiskMap, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(_prefetch, "one_by_one", lambda task: (asked.append(task), task()))
    faults = [5]
    monkeypatch.setattr(_mapping.blocks, "major_faults", lambda: faults[0])
    mapped.prefetch(["a", "b"])
    assert len(asked) == 1
    mapped.prefetch(["b"])
    mapped.prefetch(["a", "b"])  # nothing was missing since
    assert len(asked) == 1
    faults[0] = 6
    mapped.prefetch(["a", "b"])  # the system has taken some page back
    assert len(asked) == 2
    mapped.prefetch(["a"])
    assert len(asked) == 2
    mapped.release(["a"])
    mapped.prefetch(["a", "b"])
    assert len(asked) == 3


@linux
@pytest.mark.parametrize("has_blocks", [True, False])
def test_what_will_be_read_comes_to_the_page_cache_in_blocks_if_possible(
    has_blocks: bool, tmp_path: Path, save: Callable[..., str], now: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"large": torch.randn(2 << 20), "small": torch.randn(1000)}
    disk_map = DiskMap(save(tmp_path / "m.safetensors", weights))
    brought: list[int] = []
    asked: list[int] = []
    own = _mapping.bring_in
    looked_at: list[object] = []  # a look makes the kernel read the page that is looked at
    monkeypatch.setattr(
        _prefetch, "_is_cached", lambda entry: entry in looked_at or bool(looked_at.append(entry))
    )
    monkeypatch.setattr(
        _mapping, "bring_in", lambda *given: (brought.append(given[3] - given[2]), own(*given))[1]
    )
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append(length))
    monkeypatch.setattr(_mapping.blocks, "are_read", lambda memory: has_blocks)
    disk_map.prefetch(weights)
    assert brought == ([8 << 20] if has_blocks else [])
    assert sum(asked) == 4000 + (0 if has_blocks else 8 << 20)
    for name, tensor in weights.items():
        assert_same(disk_map[name], tensor)


@linux
def test_where_files_cannot_be_mapped_they_are_asked_for(
    tmp_path: Path, save: Callable[..., str], now: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no such device")

    disk_map = DiskMap(save(tmp_path / "m.safetensors", {"large": torch.zeros(2 << 20)}))
    asked: list[int] = []
    monkeypatch.setattr(_prefetch, "_is_cached", lambda entry: False)
    monkeypatch.setattr(_mapping, "_map", refuse)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append(length))
    disk_map.prefetch(["large"])
    assert sum(asked) == 8 << 20


def test_a_map_of_views_needs_no_other_threads(mapped: DiskMap) -> None:
    assert mapped.with_threads(1) is mapped


@linux
def test_a_view_of_what_is_to_be_brought_in_does_not_wait_for_its_turn(
    mapped: DiskMap, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[Any] = []
    monkeypatch.setattr(_prefetch, "one_by_one", later.append)
    mapped.prefetch(["a", "b"])
    view = mapped["b"]
    pages = -(-(view.data_ptr() % PAGE + view.nbytes) // PAGE)
    assert resident_pages(view) == pages
    assert_same(view, weights["b"])
    brought: list[int] = []
    own = _mapping.bring_in
    monkeypatch.setattr(
        _mapping, "bring_in", lambda *given: (brought.append(given[3] - given[2]), own(*given))[1]
    )
    for task in later:
        task()
    assert brought == [mapped.info("a").nbytes]  # the other is there
    assert resident_pages(mapped["a"]) >= pages - 1


@linux
def test_without_blocks_pages_are_read_in_sequence_before_they_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pages.blocks, "_is_possible", False)
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)) * 4096)
    read: list[tuple[int, int]] = []
    own = os.sendfile
    monkeypatch.setattr(
        os, "sendfile", lambda out, fd, start, n: (read.append((start, n)), own(out, fd, start, n))[1]
    )
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        assert _pages.bring_in(memory, file.fileno(), 5000, 500_000)
        assert read[0] == (4096, 500_000 - 4096)
        os.truncate(path, 100_000)
        assert not _pages.bring_in(memory, file.fileno(), 0, 500_000)  # no page there, and nobody dies
    monkeypatch.setattr(os, "sendfile", _refuse)
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        assert _pages.bring_in(memory, file.fileno(), 0, 1 << 20)  # it is slower, that is all


def _refuse(*_: object) -> int:
    raise OSError("not here")


@linux
def test_a_file_that_is_evicted_while_it_is_brought_in(
    mapped: DiskMap, now: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, found = _mapping.bring_in, []

    def evicted(memory: mmap.mmap, fd: int, start: int, stop: int) -> bool:
        mapped._index.files[0].descriptor = None
        found.append(os.fstat(fd).st_size)  # not closed, and so not another file by now
        return own(memory, fd, start, stop)

    monkeypatch.setattr(_mapping, "bring_in", evicted)
    mapped.prefetch(["a"])
    assert found == [os.path.getsize(mapped.files[0])]


UNUSED = """
import sys, time
from safemap import DiskMap, _prefetch
from safemap._mapping import Mappings
begun = []
Mappings.bring_in = lambda *_: (begun.append(1), time.sleep(60))
disk_map = DiskMap(sys.argv[1], mmap=True)
disk_map.prefetch(disk_map)
while not begun:
    time.sleep(0.001)
"""


@linux
@pytest.mark.slow
def test_a_program_does_not_wait_for_what_it_will_not_use(mapped: DiskMap) -> None:
    subprocess.run([sys.executable, "-c", UNUSED, mapped.files[0]], check=True, timeout=30)


def test_what_is_mapped_in_order_is_mapped_one_after_the_other() -> None:
    begun: list[int] = []
    gate, done = threading.Event(), threading.Event()

    def first() -> None:
        gate.wait(10)
        begun.append(1)

    one_by_one(first)
    one_by_one(lambda: (begun.append(2), done.set()))
    gate.set()
    assert done.wait(10)
    assert begun == [1, 2]


@pytest.mark.parametrize("left", [0, 100])
def test_a_file_that_is_truncated_just_before_it_is_mapped(
    left: int, mapped: DiskMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = File.check_unchanged

    def too_early(file: File, descriptor: Descriptor) -> None:
        own(file, descriptor)
        os.truncate(file.path, left)

    monkeypatch.setattr(File, "check_unchanged", too_early)
    with pytest.raises(FileChangedError, match=f"and now has {left}"):
        mapped["a"]


@linux
def test_what_was_released_before_its_turn_is_not_brought_in(
    mapped: DiskMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[Any] = []
    monkeypatch.setattr(_prefetch, "one_by_one", later.append)
    mapped.prefetch(["a", "b"])
    mapped.release(["a"])
    brought: list[int] = []
    monkeypatch.setattr(_mapping, "bring_in", lambda *given: brought.append(given[2]))
    for task in later:
        task()
    assert brought == [mapped.info("b").offset]


@linux
def test_a_map_that_was_closed_brings_nothing_in(mapped: DiskMap, monkeypatch: pytest.MonkeyPatch) -> None:
    later: list[Any] = []
    monkeypatch.setattr(_prefetch, "one_by_one", later.append)
    mapped.prefetch(["a", "b"])
    mapped.close()
    brought: list[object] = []
    monkeypatch.setattr(_mapping, "bring_in", lambda *given: brought.append(given))
    for task in later:
        task()
    assert len(later) == 1
    assert brought == []


def test_views_are_renewed(
    mapped: DiskMap, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_prefetch, "one_by_one", lambda task: None)
    views = {name: mapped[name] for name in weights}
    assert mapped.renew(weights)
    mapped.prefetch(["b"])  # whose turn does not come
    brought_in: list[int] = []
    monkeypatch.setattr(_mapping, "bring_in", lambda _, fd, start, stop: not brought_in.append(stop - start))
    assert mapped.renew("abc")
    assert mapped.renew("abc")  # once is enough
    assert brought_in == [weights["b"].nbytes]
    for name, view in views.items():
        assert_same(view, weights[name])


def test_what_is_no_view_of_a_lasting_mapping_has_to_be_read_again(
    tmp_path: Path, weights: dict[str, Tensor], save: Callable[..., str]
) -> None:
    path = save(tmp_path / "m.safetensors", weights)
    for options in (
        {},
        {"mmap": True, "torch_dtype": torch.bfloat16},
        {"mmap": True, "device": "meta"},
        {"mmap": True, "buffer_size": 10**9},
        {"mmap": True, "state_dict_converter": lambda sd: {name: sd[name] * 2 for name in sd}},
    ):
        disk_map = DiskMap(path, **options)
        disk_map.prefetch("abc")
        assert not disk_map.renew("abc"), options
    for options in ({}, {"torch_dtype": torch.float32}, {"state_dict_converter": lambda sd: dict(sd)}):
        disk_map = DiskMap(path, mmap=True, **options)
        assert disk_map.renew("abc"), options
        assert not disk_map.renew(["a", "nothing"])
    disk_map.close()
    assert not disk_map.renew("abc")


def test_views_that_lie_askew_in_their_file_are_no_views(tmp_path: Path) -> None:
    header = b'{"odd":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert (8 + len(header)) % 4
    disk_map = DiskMap(path, mmap=True)
    assert_same(disk_map["odd"], torch.zeros(4))
    assert not disk_map.renew(["odd"])


@pytest.mark.parametrize("nbytes", [100, None], ids=["truncated", "written"])
def test_views_of_a_file_that_has_changed_are_refused(
    nbytes: int | None, mapped: DiskMap, weights: dict[str, Tensor]
) -> None:
    view = mapped["a"]
    path = Path(mapped.files[0])
    os.truncate(path, path.stat().st_size if nbytes is None else nbytes)
    os.utime(path, ns=(0, 0))
    with pytest.raises(FileChangedError, match="changed after it was opened"):
        mapped.renew(weights)
    del view
