"""Getting pages before memory is written: the way that is faster, wherever it can be done at all."""

import ctypes
import errno
import mmap
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safemap import _first_touch, _madvise
from safemap._buffers import BufferPool
from safemap._first_touch import FirstTouch

MIB = 1 << 20
HUGE, SMALL, POPULATE = _madvise.HUGE_PAGES, _madvise.SMALL_PAGES, _madvise.POPULATE_WRITE


class Kernel:
    """What ``madvise`` is told, and a clock that says how long it takes."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds  # for a byte, by kind of page
        self.now = 0.0
        self.kind = 0
        self.steps: list[tuple[int, int, int]] = []
        self.advised: list[int] = []
        self.fails_with = 0

    def __call__(self, address: int, length: int, advice: int) -> int:
        if advice != POPULATE:
            self.kind = advice
            self.advised.append(advice)
            return 0
        if self.fails_with:
            ctypes.set_errno(self.fails_with)
            return -1
        self.steps.append((address, length, self.kind))
        self.now += length * self.seconds[self.kind]
        return 0


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], FirstTouch]:
    def install(kernel: Kernel) -> FirstTouch:
        monkeypatch.setattr(_first_touch, "find_madvise", lambda: kernel)
        monkeypatch.setattr(_first_touch, "perf_counter", lambda: kernel.now)
        return FirstTouch()

    return install


@pytest.mark.parametrize(("faster", "slower"), [(HUGE, SMALL), (SMALL, HUGE)])
def test_the_faster_kind_of_page_is_used_and_the_other_tried_again(
    faster: int, slower: int, install: Callable[[Kernel], FirstTouch]
) -> None:
    kernel = Kernel({faster: 1e-9, slower: 2e-9})
    touch, memory = install(kernel), mmap.mmap(-1, 2048 * MIB)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % (8 * MIB)  # only whole steps
    touch(memory, begin, len(memory))
    kinds = [kind for _, _, kind in kernel.steps]
    assert set(kinds[:2]) == {HUGE, SMALL}
    assert [index for index, kind in enumerate(kinds[2:], 1) if kind == slower] == [8, 24, 56, 120, 184, 248]
    del kernel.steps[:]
    kernel.seconds = {faster: 3e-9, slower: 2e-9}  # the machine has changed
    touch(memory, begin, len(memory))
    tried = [index for index, (_, _, kind) in enumerate(kernel.steps) if kind == faster]
    assert tried == [0, 8, 24, 56, 120, 184, 248]
    del kernel.steps[:]
    kernel.seconds = {faster: 1e-9, slower: 2e-9}  # and back
    touch(memory, begin, len(memory))
    kinds = [kind for _, _, kind in kernel.steps]
    assert kinds.index(faster) <= 64
    assert kinds[kinds.index(faster) :][:8] == [faster] * 8


def test_every_byte_once_and_steps_end_where_huge_pages_do(install: Callable[[Kernel], FirstTouch]) -> None:
    kernel = Kernel({HUGE: 1e-9, SMALL: 1e-9})
    touch, memory = install(kernel), mmap.mmap(-1, 40 * MIB)
    touch(memory, 5000, 33 * MIB + 1)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    position = base + mmap.PAGESIZE
    for address, length, _ in kernel.steps:
        assert address == position
        position += length
        assert position % (2 * MIB) == 0 or position == base + 33 * MIB + 1
    assert position == base + 33 * MIB + 1


def test_an_older_kernel_is_asked_once_and_then_for_huge_pages_only(
    install: Callable[[Kernel], FirstTouch],
) -> None:
    kernel = Kernel({})
    kernel.fails_with = errno.EINVAL
    touch, memory = install(kernel), mmap.mmap(-1, 4 * MIB)
    touch(memory, 0, len(memory))
    kernel.fails_with, kernel.seconds = 0, {HUGE: 1.0, SMALL: 1.0}
    touch(memory, 0, len(memory))
    assert not kernel.steps
    assert set(kernel.advised) == {HUGE}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_of_the_pool_has_its_pages() -> None:
    def resident() -> int:
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * mmap.PAGESIZE

    pool = BufferPool()
    before = resident()
    view = pool.take(64 * MIB, threads=2)
    if _first_touch.first_touch._madvise is None:
        pytest.skip("this kernel cannot populate memory")
    assert view is not None
    assert resident() - before > 60 * MIB
