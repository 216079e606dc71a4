"""What is asked for ahead of a read, and when."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safemap import DiskMap, _readahead
from safemap._file import File
from safemap._readahead import ReadAhead
from safemap.testing import assert_same
from torch import Tensor

MIB = 1 << 20
pytestmark = pytest.mark.skipif(
    not (hasattr(os, "RWF_NOWAIT") and _readahead.CAN_ASK), reason="the system cannot be asked"
)


class Disk:
    """Stands for the page cache of one file: what is in it, and what it was asked to bring."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cached_from = 0  # bytes from here on are cached
        self.cached_to = 0  # and those up to here
        self.asked: list[tuple[int, int]] = []
        self.probes = 0
        monkeypatch.setattr(os, "preadv", self._preadv)
        monkeypatch.setattr(os, "posix_fadvise", self._advise)

    def _preadv(self, fd: int, buffers: tuple[bytearray], offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        self.probes += 1
        if self.cached_to <= offset < self.cached_from:
            raise BlockingIOError
        return len(buffers[0])

    def _advise(self, fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        assert length <= 128 << 10  # the kernel drops what exceeds its window
        if self.asked and self.asked[-1][1] == offset:
            self.asked[-1] = (self.asked[-1][0], offset + length)
        else:
            self.asked.append((offset, offset + length))


@pytest.fixture
def file(tmp_path: Path) -> File:
    with open(tmp_path / "file", "wb") as stream:
        stream.truncate(300 * MIB)  # sparse
    return File(str(tmp_path / "file"))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_nothing_is_asked_of_a_warm_file(file: File, disk: Disk) -> None:
    ahead = ReadAhead()
    for position in (0, 10, 20, 100):
        ahead.before(file, position * MIB, 10 * MIB)
    assert disk.asked == []
    assert disk.probes == 8


def test_reads_anywhere_ask_for_themselves(file: File, disk: Disk) -> None:
    ahead = ReadAhead()
    disk.cached_from = 200 * MIB
    for position in (50, 100, 10, 250):
        ahead.before(file, position * MIB + 3, 10 * MIB)
    assert disk.asked == [(position * MIB + 3, (position + 10) * MIB + 3) for position in (50, 100, 10)]


def test_pages_that_came_with_the_neighbours_do_not_stand_for_all(file: File, disk: Disk) -> None:
    ahead = ReadAhead()
    disk.cached_to, disk.cached_from = 21 * MIB, 31 * MIB
    ahead.before(file, 20 * MIB, 12 * MIB)
    assert disk.asked == [(20 * MIB, 32 * MIB)]
    disk.asked.clear()
    disk.cached_to = 31 * MIB
    ahead.before(file, 20 * MIB, 12 * MIB)
    assert disk.asked == []


def test_reads_that_follow_each_other_ask_for_what_comes_next(file: File, disk: Disk) -> None:
    ahead = ReadAhead()
    disk.cached_from = 300 * MIB
    for position in range(0, 300, 10):
        ahead.before(file, position * MIB, 10 * MIB)
        asked = disk.asked[-1][1]
        assert asked >= min(300, position + 10 + (32 if position else 0)) * MIB
        assert asked <= min(300, position + 10 + 64) * MIB
    assert disk.asked == [(0, 300 * MIB)]  # each byte once, none behind the end
    assert disk.probes <= 6  # what was asked for need not be probed


def test_a_file_system_that_cannot_be_probed(file: File, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "preadv", refuse)
    ahead = ReadAhead()
    ahead.before(file, 0, 10 * MIB)
    monkeypatch.setattr(os, "preadv", None)  # not tried again
    ahead.before(file, 50 * MIB, 10 * MIB)
    assert disk.asked == []


def test_advice_that_fails_is_no_error(file: File, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ESPIPE, "no advice")

    disk.cached_from = 300 * MIB
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    ReadAhead().before(file, 0, 10 * MIB)


@pytest.mark.parametrize("options", [{}, {"threads": 1}, {"torch_dtype": torch.float64}], ids=str)
def test_values_of_a_cold_file(options: dict, tmp_path: Path, save) -> None:
    tensors: dict[str, Tensor] = {f"t{i}": torch.randn(i * 400_000 + 1) for i in range(5)}
    path = save(tmp_path / "m.safetensors", tensors)
    disk_map = DiskMap(path, **options)
    for names in (sorted(tensors), sorted(tensors, reverse=True)):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for name in names:
            assert_same(disk_map[name], tensors[name].to(options.get("torch_dtype", torch.float32)))
