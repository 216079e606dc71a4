"""How fast a disk reads: pieces spread over a file are dropped from the page cache and read again.

A disk reaches its rate only if it has many requests at a time. So the kernel is asked for a whole piece
before the piece is read, as by a loader that knows what it will need.
"""

import io
import os
import stat
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

from offload_layers._errors import ConfigError

_PIECE = 32 << 20  # bytes, of the order of a layer's weights
_ROUNDS = 3
#: bytes of one request: of a longer one, Linux may leave out what exceeds the read-ahead window of the disk,
#: which is 128 KiB unless configured. Source: mm/readahead.c
_WINDOW = 128 << 10


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
            _read(opened, start, buffer)
            now, busy = time.perf_counter(), time.thread_time() - busy
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


def _read(opened: io.FileIO, start: int, buffer: memoryview) -> None:
    if hasattr(os, "posix_fadvise"):
        for position in range(start, start + len(buffer), _WINDOW):
            os.posix_fadvise(opened.fileno(), position, _WINDOW, os.POSIX_FADV_WILLNEED)
    opened.seek(start)
    done = 0
    while done < len(buffer):
        count = opened.readinto(buffer[done:])
        if not count:
            raise ConfigError(f"{opened.name} has become shorter while it was read; try again")
        done += count
