"""Reading at a position without moving a file offset that threads share."""

import os
import threading

_MAX_READ = 0x7FFFF000  # Source: Linux transfers at most this many bytes per call

if hasattr(os, "preadv"):

    def _read_once(fd: int, view: memoryview, offset: int) -> int:
        return os.preadv(fd, (view,), offset)

elif hasattr(os, "pread"):

    def _read_once(fd: int, view: memoryview, offset: int) -> int:
        data = os.pread(fd, min(len(view), 1 << 23), offset)
        view[: len(data)] = data
        return len(data)

else:  # Windows: no positional read, so one at a time
    _SEEKING = threading.Lock()

    def _read_once(fd: int, view: memoryview, offset: int) -> int:
        with _SEEKING:
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, min(len(view), 1 << 23))
        view[: len(data)] = data
        return len(data)


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Fill *view* from *offset* on; return how many bytes there were, fewer only at the end of the file."""
    done, total = 0, len(view)
    while done < total:
        count = _read_once(fd, view[done : done + _MAX_READ], offset + done)
        if count == 0:
            break
        done += count
    return done


def read_bytes(fd: int, nbytes: int, offset: int) -> bytes:
    """Return *nbytes* bytes from *offset* on, fewer only at the end of the file."""
    if hasattr(os, "pread"):
        data = os.pread(fd, nbytes, offset)  # at once, unless a signal or the end of the file comes between
        if len(data) == nbytes:
            return data
    buffer = bytearray(nbytes)
    count = read_at(fd, memoryview(buffer), offset)
    return bytes(buffer[:count])
