"""Mapped files that are read in blocks: what the kernel is told, and what is done if it does otherwise."""

import mmap
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from safemap import _blocks, _pages, _readahead
from safemap._blocks import Blocks
from safemap._file import File
from safemap._madvise import HUGE_PAGES, POPULATE_READ, SMALL_PAGES

MIB = 1 << 20
NORMAL, RANDOM = 0, 1
EINVAL = -1
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs madvise of Linux")


class Kernel:
    """Answers ``madvise`` and counts faults as a kernel would that reads *faults_a_step* times for a step."""

    def __init__(self, *, faults_a_step: int = 2, has_huge_pages: bool = True) -> None:
        self.faults_a_step = faults_a_step
        self.has_huge_pages = has_huge_pages
        self.advice: list[int] = []
        self.faults = 100
        self.others = 7  # faults of other threads

    def madvise(self, address: int, nbytes: int, advice: int) -> int:
        if advice == HUGE_PAGES and not self.has_huge_pages:
            return EINVAL
        if advice == POPULATE_READ:
            self.faults += self.faults_a_step
        else:
            self.advice.append(advice)
        return 0

    def getrusage(self, who: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(ru_majflt=self.faults + (self.others if who == 0 else 0))

    RUSAGE_SELF, RUSAGE_THREAD = 0, 1


def run_on(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Blocks:
    monkeypatch.setattr(_blocks, "find_madvise", lambda: kernel.madvise)
    monkeypatch.setattr(_blocks, "resource", kernel)
    monkeypatch.setattr(_pages, "_madvise", kernel.madvise)
    blocks = Blocks()
    monkeypatch.setattr(_pages, "blocks", blocks)
    return blocks


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[mmap.mmap]:
    (tmp_path / "file").write_bytes(bytes(20 * MIB))
    with open(tmp_path / "file", "rb") as file:
        yield mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is read in sequence."""
    read: list[int] = []
    monkeypatch.setattr(os, "sendfile", lambda out, fd, start, nbytes: (read.append(nbytes), nbytes)[1])
    return read


def test_a_mapping_is_advised_once_and_nothing_is_read_besides(
    memory: mmap.mmap, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    run_on(kernel, monkeypatch)
    for start in (0, 10 * MIB):
        assert _pages.bring_in(memory, 0, start, start + 9 * MIB)
    assert kernel.advice == [HUGE_PAGES, RANDOM]
    assert sent == []


def test_a_kernel_that_reads_page_by_page_is_noticed_at_the_first_step(
    memory: mmap.mmap, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(faults_a_step=1024)
    blocks = run_on(kernel, monkeypatch)
    assert _pages.bring_in(memory, 0, 0, 20 * MIB)
    assert kernel.advice == [HUGE_PAGES, RANDOM, SMALL_PAGES, NORMAL]
    assert sum(sent) == 16 * MIB  # all but the first step
    assert not blocks.are_read(memory)


def test_a_kernel_without_huge_pages_is_not_told_that_reads_are_random(
    memory: mmap.mmap, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(has_huge_pages=False)
    run_on(kernel, monkeypatch)
    assert _pages.bring_in(memory, 0, 0, 20 * MIB)
    assert kernel.advice == []
    assert sum(sent) == 20 * MIB


def test_faults_that_bring_something_in_do_not_count(
    memory: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    blocks = run_on(kernel, monkeypatch)
    before = blocks.major_faults()
    assert _pages.bring_in(memory, 0, 0, 20 * MIB)
    assert kernel.faults > 100
    assert blocks.major_faults() == before
    kernel.others += 1
    assert blocks.major_faults() == before + 1


def test_where_nobody_counts_faults_each_answer_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "resource", None)
    blocks = Blocks()
    assert blocks.major_faults() != blocks.major_faults()


def test_what_lies_beside_a_range_is_not_read(tmp_path: Path) -> None:
    """On this machine, as it is: pages that others look at just then stay in the page cache."""
    for attempt in range(4):
        beside, within = _cached_after_a_range_was_brought_in(tmp_path / f"file {attempt}")
        assert within == [True, True, True]
        if beside == [False, False, False]:
            return
    pytest.fail(f"beside a range something was read each time, the last time {beside}")


def _cached_after_a_range_was_brought_in(path: Path) -> tuple[list[bool | None], list[bool | None]]:
    """Bring 20 to 40 MiB of a new file in; return what is cached beside, and within."""
    path.write_bytes(os.urandom(64 * MIB))
    file = File(str(path))
    fd = file.open().fd
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if _readahead.is_cached(file, 0, 40 * MIB) is not False:
        pytest.skip("the page cache of this file system does not tell, or keeps what it has")
    memory = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    if not _pages.bring_in(memory, fd, 20 * MIB + 5000, 40 * MIB) or not _pages.blocks.are_read(memory):
        pytest.skip("this kernel does not read in blocks")
    # from behind, since a read ahead of a page may bring in those that follow it
    beside = [_readahead.is_cached(file, end * MIB - 1, end * MIB) for end in (60, 43, 19)]
    within = [_readahead.is_cached(file, end * MIB - 1, end * MIB) for end in (40, 30, 21)]
    path_bytes = path.read_bytes()
    assert memory[20 * MIB : 40 * MIB] == path_bytes[20 * MIB : 40 * MIB]
    return beside, within
