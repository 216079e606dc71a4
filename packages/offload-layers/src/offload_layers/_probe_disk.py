"""How fast a disk reads: pieces spread over a file are dropped from the page cache and read again.

A disk reaches its rate only if it has many requests at a time, and large ones. So a whole piece is brought
into the page cache before it is read, as by a loader that knows what it will need: in blocks of 2 MiB through
a mapping, where the kernel reads those at once, else by asking for each read-ahead window. The first takes a
hundredth of the processor's time, and depends on no setting of the device. Only then is the rate that of
bringing in alone, since reading is left to another thread by a loader.

Source: do_sync_mmap_readahead in mm/filemap.c of Linux, since 5.18.
"""

import contextlib
import io
import mmap
import os
import stat
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

from offload_layers._errors import ConfigError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_PIECE = 32 << 20  # bytes, of the order of a layer's weights
_ROUNDS = 3
#: bytes of one request: of a longer one, Linux may leave out what exceeds the read-ahead window of the disk,
#: which is 128 KiB unless configured. Source: mm/readahead.c
_WINDOW = 128 << 10
_BLOCK = 2 << 20  # bytes that one fault reads in a mapping that wants huge pages
_MOST_FAULTS = 4  # of one block; a kernel that reads page by page has hundreds
_POPULATE_READ = 22  # Source: include/uapi/asm-generic/mman-common.h of Linux; fails where a fault would kill


class DiskRate(NamedTuple):
    """How a file is read.

    Attributes:
        bytes_per_s: Of the disk, or of the page cache.
        is_cached: Whether it was the page cache.
        processor_s_per_byte: Seconds for which reading keeps one core busy.
    """

    bytes_per_s: float
    is_cached: bool
    processor_s_per_byte: float


def probe_disk(file: str | os.PathLike[str], *, seconds: float) -> DiskRate:
    """Return how fast *file* is read.

    Each piece is read once, in an order that soon has been everywhere. Those that could be dropped count. If
    none could, because the system cannot do that, the file was just written or others have it mapped, all do.
    Afterwards the pieces are in the page cache.

    Raises:
        ConfigError: there is nothing to read.
    """
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}  # is cached -> bytes/s, seconds/byte
    with _open(file) as opened:
        fd = opened.fileno()
        nbytes = os.fstat(fd).st_size
        buffer = memoryview(bytearray(b"\1") * min(_PIECE, nbytes))  # not zeros: those would be no memory yet
        end = time.perf_counter() + seconds
        for start in _spread(nbytes):
            _drop(fd, start, len(buffer))
            is_cached = _is_cached(fd, start + len(buffer) // 2)
            begin, busy = time.perf_counter(), time.thread_time()
            came_in_blocks = _bring_in(fd, start, start + len(buffer))
            now = time.perf_counter()
            _read(opened, start, buffer)
            if not came_in_blocks:
                now = time.perf_counter()
            busy = time.thread_time() - busy
            found[is_cached].append((len(buffer) / (now - begin), busy / len(buffer)))
            if now >= end and sum(map(len, found.values())) >= _ROUNDS:
                break
    is_cached = not found[False]
    rates, costs = zip(*found[is_cached], strict=True)
    return DiskRate(statistics.median(rates), is_cached, statistics.median(costs))


def _open(file: str | os.PathLike[str]) -> io.FileIO:
    try:
        status = os.stat(file)
        if stat.S_ISREG(status.st_mode) and status.st_size:
            return io.FileIO(file)
    except OSError as error:
        raise ConfigError(f"{os.fspath(file)} cannot be read: {error.strerror}; name a checkpoint") from error
    raise ConfigError(f"{os.fspath(file)} is no file, or an empty one; name a checkpoint")


def _spread(nbytes: int) -> Iterator[int]:
    """Yield where pieces start: each once, first far apart and then between those."""
    pieces = max(1, nbytes // _PIECE)
    bits = pieces.bit_length()
    for index in sorted(range(pieces), key=lambda index: f"{index:0{bits}b}"[::-1]):
        yield index * _PIECE


def _drop(fd: int, start: int, length: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)


def _is_cached(fd: int, position: int) -> bool:
    """Ask by a read that must not wait; where there is none, say what dropping should have led to."""
    if not hasattr(os, "RWF_NOWAIT"):
        return not hasattr(os, "posix_fadvise")
    try:
        return os.preadv(fd, [bytearray(1)], position, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:  # this file system does not tell
        return False


def _bring_in(fd: int, start: int, stop: int) -> bool:
    """Bring a piece into the page cache; return False if it was only asked for."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # another system, kernel or file system
        return _bring_in_blocks(fd, start, stop)
    if hasattr(os, "posix_fadvise"):
        for position in range(start, stop, _WINDOW):
            os.posix_fadvise(fd, position, _WINDOW, os.POSIX_FADV_WILLNEED)
    return False


def _bring_in_blocks(fd: int, start: int, stop: int) -> bool:
    """Return True; raise if this is not possible here."""
    with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(mmap.MADV_RANDOM)
        for position in range(start, stop, _BLOCK):
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
            memory.madvise(_POPULATE_READ, position, min(_BLOCK, stop - position))
            if resource.getrusage(resource.RUSAGE_THREAD).ru_majflt - before > _MOST_FAULTS:
                raise OSError("this kernel reads page by page")
    return True


def _read(opened: io.FileIO, start: int, buffer: memoryview) -> None:
    opened.seek(start)
    done = 0
    while done < len(buffer):
        count = opened.readinto(buffer[done:])
        if not count:
            raise ConfigError(f"{opened.name} has become shorter while it was read; try again")
        done += count
