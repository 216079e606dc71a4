"""Measured rates: that they are plausible, not how high they are."""

import dataclasses
import errno
import itertools
import logging
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from offload_layers import ConfigError, Rates, _probe, _probe_disk
from offload_layers._probe import probe
from offload_layers._probe_disk import probe_disk
from torch import nn

needs_nowait = pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="no reads that must not wait here")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in hundredths of a second: how much is moved does not matter here."""
    monkeypatch.setattr(_probe, "_WIDTH", 64)
    monkeypatch.setattr(_probe, "_ROUND_S", 0.001)
    monkeypatch.setattr(_probe, "_MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(_probe, "_BUS_BYTES", 1 << 20)
    monkeypatch.setattr(_probe_disk, "_PIECE", 1 << 16)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "checkpoint.safetensors"
    with path.open("wb") as opened:
        opened.write(os.urandom(5 * (1 << 16) + 77))
        os.fsync(opened.fileno())  # dirty pages cannot be dropped
    return str(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_rates_are_plausible(device: torch.device, file: str, dtype: torch.dtype, multiplies_fp8) -> None:
    if dtype.itemsize == 1 and not multiplies_fp8(device):
        pytest.skip("no products of eight-bit floats here")
    rates = probe(device, file=file, dtype=dtype, seconds=0.01)
    *per_s, busy = dataclasses.astuple(rates)
    assert all(1e3 < rate < 1e18 for rate in per_s)
    assert 0 < busy < 1e-3


def test_without_a_file_the_disk_takes_no_time(device: torch.device) -> None:
    rates = probe(device, seconds=0)
    assert rates.disk_bytes_per_s == math.inf
    *others, busy = dataclasses.astuple(rates)[1:]
    assert all(0 < rate < math.inf for rate in others)
    assert busy == 0


@pytest.mark.parametrize("rows", [1, 100, 1_000_000])
def test_as_many_rows_as_asked_for(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    multiply = nn.functional.linear
    monkeypatch.setattr(_probe, "_ROUND_S", 1e9)
    monkeypatch.setattr(_probe, "_rate", lambda amount, act, *_: act() is None or amount)
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: seen.add(len(x)) or multiply(x, *rest))
    probe(torch.device("cpu"), rows=rows, seconds=0)
    assert max(seen) == min(rows, _probe._MOST_ROWS)


def test_a_cpu_has_no_bus() -> None:
    rates = probe(torch.device("cpu"), seconds=0)
    assert rates.bus_bytes_per_s == rates.memory_bytes_per_s


def test_rates_do_not_change() -> None:
    rates = Rates(1.0, 2.0, 3.0, 4.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rates.flops = 5.0  # type: ignore[misc]


def test_the_programs_random_numbers_stay_as_they_are(device: torch.device) -> None:
    module = torch.get_device_module(device) if device.type != "cpu" else torch.random
    before = module.get_rng_state()
    probe(device, seconds=0)
    assert torch.equal(module.get_rng_state(), before)


def test_the_figure_is_the_median_and_not_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = iter([100.0, 1e-4, *[5e-4] * 10, *[1e-4] * 10, *[2e-4] * 10])  # so a round is ten times
    now = [0.0]

    def act() -> None:
        now[0] += next(takes)

    monkeypatch.setattr(_probe.time, "perf_counter", lambda: now[0])
    assert _probe._rate(10.0, act, torch.device("cpu"), seconds=0) == pytest.approx(10.0 / 2e-4)
    assert next(takes, None) is None


def test_what_cannot_be_multiplied_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        probe(torch.device("cpu"), dtype=torch.bool, seconds=0)
    assert str(refused.value).startswith("cpu cannot multiply matrices of torch.bool: ")


def test_a_device_that_is_none() -> None:
    with pytest.raises(ConfigError) as refused:
        probe(torch.device("meta"))
    assert str(refused.value) == "torch cannot compute on meta; choose cpu or cuda, for example"


def test_a_device_that_is_one_too_many() -> None:
    with pytest.raises(ConfigError) as refused:
        probe(torch.device("cpu:1"))
    assert str(refused.value) == "there is no cpu:1: torch sees 1 cpu device"


class TestDisk:
    def test_each_piece_is_read_once_and_soon_everywhere(self) -> None:
        starts = [start >> 16 for start in _probe_disk._spread(8 << 16)]
        assert starts == [0, 4, 2, 6, 1, 5, 3, 7]
        assert sorted(_probe_disk._spread((5 << 16) + 77)) == [index << 16 for index in range(5)]
        assert list(_probe_disk._spread(77)) == [0]

    def test_a_small_file_is_one_piece(self, tmp_path: Path) -> None:
        (tmp_path / "small").write_bytes(b"x" * 100)
        rate, _, busy = probe_disk(tmp_path / "small", seconds=0)
        assert 0 < rate < math.inf
        assert 0 < busy < 1

    def test_time_ends_it(self, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
        starts = []
        read = _probe_disk._read
        monkeypatch.setattr(
            _probe_disk,
            "_read",
            lambda opened, start, buffer: (starts.append(start), read(opened, start, buffer)),
        )
        probe_disk(file, seconds=0)
        assert len(starts) == 3
        probe_disk(file, seconds=100)  # each piece once, and no more
        assert sorted(starts[3:]) == [index << 16 for index in range(5)]

    @pytest.mark.parametrize("came_in_blocks", [True, False])
    def test_what_was_dropped_counts(
        self, file: str, came_in_blocks: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cached, bringing_in = iter([True, False, True, False, True]), iter([1, 8, 1, 8, 1])
        now = 0.0

        def bring_in(fd: int, start: int, stop: int) -> bool:
            nonlocal now
            now += next(bringing_in)
            return came_in_blocks

        def read(opened: object, start: int, buffer: object) -> None:
            nonlocal now
            now += 2

        monkeypatch.setattr(_probe_disk, "_is_cached", lambda fd, position: next(cached))
        monkeypatch.setattr(_probe_disk, "_bring_in", bring_in)
        monkeypatch.setattr(_probe_disk, "_read", read)
        monkeypatch.setattr(_probe_disk.time, "perf_counter", lambda: now)
        took = 8 if came_in_blocks else 8 + 2  # what was only asked for comes while it is read
        assert probe_disk(file, seconds=100)[:2] == ((1 << 16) / took, False)

    @pytest.mark.parametrize("lacks", ["madvise", "reading", "blocks"])
    def test_where_nothing_comes_in_blocks_it_is_asked_for(
        self, file: str, lacks: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not hasattr(os, "posix_fadvise"):
            pytest.skip("no hints here")
        if lacks == "madvise":
            monkeypatch.delattr(_probe_disk.mmap, "MADV_HUGEPAGE", raising=False)
        elif lacks == "reading":
            monkeypatch.setattr(_probe_disk, "_POPULATE_READ", 12345)
        else:
            faults = itertools.count(0, 16)  # 16 pages of a kernel that reads one by one

            def getrusage(who: int) -> object:
                return SimpleNamespace(ru_majflt=next(faults))

            monkeypatch.setattr(_probe_disk.resource, "getrusage", getrusage)
        asked = []
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, *asked_for: asked.append(asked_for))
        with open(file, "rb") as opened:
            assert not _probe_disk._bring_in(opened.fileno(), 0, 300_000)
        assert [start for start, _, advice in asked if advice == os.POSIX_FADV_WILLNEED] == [
            0,
            1 << 17,
            1 << 18,
        ]

    @needs_nowait
    def test_what_comes_in_blocks_is_there(self, file: str) -> None:
        with open(file, "rb") as opened:
            fd = opened.fileno()
            _probe_disk._drop(fd, 0, os.path.getsize(file))
            if not _probe_disk._bring_in(fd, 1 << 16, 3 << 16):
                pytest.skip("this kernel or file system has no blocks")
            assert all(_probe_disk._is_cached(fd, position) for position in range(1 << 16, 3 << 16, 4096))

    @needs_nowait
    def test_whether_it_is_cached_is_asked(self, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
        Path(file).read_bytes()
        with open(file, "rb") as opened:
            assert _probe_disk._is_cached(opened.fileno(), 1 << 16)

        def refuse(number: int) -> None:
            def preadv(*_: object) -> int:
                raise OSError(number, os.strerror(number))

            monkeypatch.setattr(os, "preadv", preadv)

        refuse(errno.EAGAIN)
        assert not _probe_disk._is_cached(0, 0)
        refuse(errno.EOPNOTSUPP)
        assert not _probe_disk._is_cached(0, 0)

    @needs_nowait
    def test_a_file_that_stays_in_the_page_cache_is_told(
        self, file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        Path(file).read_bytes()
        monkeypatch.setattr(_probe_disk, "_drop", lambda *_: None)
        _, is_cached, _ = probe_disk(file, seconds=0)
        assert is_cached
        with caplog.at_level(logging.WARNING, "offload_layers"):
            rates = probe(torch.device("cpu"), file=file, seconds=0)
        assert rates.disk_bytes_per_s < math.inf
        assert caplog.messages == [
            f"{file} stays in the page cache; its disk was not measured, but the cache"
        ]

    def test_a_system_without_hints(self, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("posix_fadvise", "RWF_NOWAIT"):
            monkeypatch.delattr(os, name, raising=False)
        rate, is_cached, _ = probe_disk(file, seconds=0)
        assert 0 < rate < math.inf
        assert is_cached

    def test_a_file_that_is_not_there(self) -> None:
        with pytest.raises(ConfigError) as refused:
            probe_disk("nowhere", seconds=0)
        assert str(refused.value) == "nowhere cannot be read: No such file or directory; name a checkpoint"

    def test_nothing_to_read(self, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        for path in (tmp_path / "empty", tmp_path):
            with pytest.raises(ConfigError) as refused:
                probe_disk(path, seconds=0)
            assert str(refused.value) == f"{path} is no file, or an empty one; name a checkpoint"

    def test_a_file_that_gets_shorter(self, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_probe_disk, "_drop", lambda *_: os.truncate(file, 10))
        with pytest.raises(ConfigError) as refused:
            probe_disk(file, seconds=0)
        assert str(refused.value) == f"{file} has become shorter while it was read; try again"
