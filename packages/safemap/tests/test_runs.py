"""Parts that are many runs of the file: which bytes are read, and that they come to their places."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safemap import DiskMap, FileChangedError, _runs
from safemap.testing import assert_same

if not hasattr(os, "preadv"):
    pytest.skip("what is read is counted at preadv", allow_module_level=True)

ROWS, CALLS = 1100, 3  # a call takes 512 runs at most

#: columns of int32 in all, and in the part; whether the gaps are read
SHAPES = {
    "run of a page": (4096, 1024, False),
    "run below a page": (4096, 1023, True),
    "half a page of two": (1024, 512, True),
    "page beside a page": (2048, 1024, False),
    "gap below a page": (2047, 1024, True),
    "one element of 32 KiB": (8192, 1, True),
    "short run far from the next": (8193, 1, False),
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bytes each call has read."""
    calls: list[int] = []
    real = os.preadv

    def preadv(fd: int, buffers, offset: int, *flags: int) -> int:
        count = real(fd, buffers, offset, *flags)
        if not flags:  # with flags it only asks whether pages are in memory
            calls.append(count)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return calls


@pytest.mark.parametrize(("width", "columns", "reads_gaps"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("at_end", [False, True], ids=["first columns", "last columns"])
def test_columns(
    width: int, columns: int, reads_gaps: bool, at_end: bool, read: list[int], tmp_path: Path, save
) -> None:
    """Nothing is read before the first run of a call or after its last; what is read was announced."""
    tensor = torch.arange(ROWS * width, dtype=torch.int32).view(ROWS, width)
    part = DiskMap(save(tmp_path / "m.safetensors", {"t": tensor})).slice("t")
    columns_read = slice(width - columns, width) if at_end else slice(columns)
    nbytes = (ROWS * columns + (ROWS - CALLS) * (width - columns) * reads_gaps) * 4
    assert part.nbytes((slice(None), columns_read)) == nbytes
    assert part.nbytes((slice(1, 2), columns_read)) == columns * 4, "one row is one run"
    read.clear()
    assert_same(part[:, columns_read], tensor[:, columns_read])
    assert sum(read) == nbytes
    assert len(read) == (CALLS if reads_gaps else ROWS)


def test_rows_are_read_without_their_neighbours(read: list[int], tmp_path: Path, save) -> None:
    tensor = torch.arange(1_000_000).view(1000, 1000)
    part = DiskMap(save(tmp_path / "m.safetensors", {"t": tensor})).slice("t")
    read.clear()
    assert_same(part[10:20], tensor[10:20])
    assert sum(read) == 80_000


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part(data: st.DataObject, tmp_path: Path, save) -> None:
    """Of up to four dimensions, cut along any of them."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, extent)] * 2))) for extent in shape]
    key = tuple(slice(start, stop) for start, stop in bounds)
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    part = DiskMap(save(tmp_path / "any.safetensors", {"t": tensor})).slice("t")
    with pytest.MonkeyPatch.context() as patch:
        # both ways, whatever the sizes
        patch.setattr(_runs, "_PAGE", data.draw(st.sampled_from([1, 4096])))
        assert_same(part[key], tensor[key])


@pytest.mark.parametrize("can_scatter", [True, False])
@pytest.mark.parametrize("columns", [100, 3000])
def test_calls_that_return_early(
    can_scatter: bool, columns: int, tmp_path: Path, save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may end a call; and some systems have no preadv."""
    tensor = torch.randn(ROWS, 5000)
    part = DiskMap(save(tmp_path / "m.safetensors", {"t": tensor})).slice("t")
    real = os.preadv
    interrupted = []

    def preadv(fd: int, buffers, offset: int, *flags: int) -> int:
        first = memoryview(buffers[0])
        if len(buffers) == 1 and len(first) < 8:
            return real(fd, buffers, offset, *flags)
        interrupted.append(offset)
        return real(fd, [first[: max(1, len(first) // 2)]], offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(_runs, "_CAN_SCATTER", can_scatter)
    assert_same(part[:, :columns], tensor[:, :columns])
    assert interrupted
    if not can_scatter:
        assert part.nbytes((slice(None), slice(columns))) == ROWS * columns * 4


@pytest.mark.parametrize("columns", [100, 3000])
def test_truncated_file(columns: int, tmp_path: Path, save) -> None:
    path = save(tmp_path / "m.safetensors", {"t": torch.randn(ROWS, 5000)})
    part = DiskMap(path).slice("t")
    os.truncate(path, os.stat(path).st_size // 2)
    with pytest.raises(FileChangedError, match="truncated"):
        part[:, :columns]


@pytest.mark.parametrize("columns", [100, 3000])
def test_file_that_was_written_to(columns: int, tmp_path: Path, save) -> None:
    path = save(tmp_path / "m.safetensors", {"t": torch.zeros(ROWS, 5000)})
    part = DiskMap(path).slice("t")
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    os.utime(path, ns=(0, 0))  # clocks of file systems are coarse
    with pytest.raises(FileChangedError, match="written to"):
        part[:, :columns]
