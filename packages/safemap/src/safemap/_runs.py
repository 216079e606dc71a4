"""Runs of bytes at a constant distance from each other, such as some columns of a matrix.

Note [Gaps]
    A system call for each run costs 2 to 3 µs with the loop around it.  ``preadv`` scatters: one call can
    fill 512 runs, and throw what lies between them into a scratch that stays in the cache.  That reads the
    gaps, so it is done in two cases only.  Gaps shorter than a page: a disk reads their pages in any case.
    Runs shorter than a page: their pages belong to other parts as well, and reading each run alone would ask
    for the same page again.

    For gaps from ``_WIDEST_GAP`` on, runs are read alone however short.  Measured, microseconds for a run of
    2 KB, scattered and alone: gaps of 8 KB 2.3 and 3.1, of 16 KB 3.9 and 3.0, of 32 KB 5.8 and 2.9; with a
    cold page cache, where the kernel reads ahead of what is sequential only, 10 and 49, 14 and 53, 20 and 47.
"""

import os

from safemap._file import File

_PAGE = 4096  # bytes
_WIDEST_GAP = 32 << 10  # bytes; Source: Note [Gaps]
_BUFFERS = 1024  # of one call; Source: UIO_MAXIOV of Linux, IOV_MAX of macOS
_CALL = 64 << 20  # bytes of one call; the kernel would transfer 2 GiB at most
_CAN_SCATTER = hasattr(os, "preadv")


def span(run: int, pitch: int, count: int) -> int:
    """Return how many bytes ``read_runs`` reads."""
    if not _reads_gaps(run, pitch):
        return count * run
    calls = -(-count // _runs_of_a_call(pitch))  # the gap between two calls is not read
    return count * run + (count - calls) * (pitch - run)


def read_runs(file: File, offset: int, run: int, pitch: int, view: memoryview) -> None:
    """Fill *view* with runs of *run* bytes that begin *pitch* bytes apart, the first at *offset*.

    Raises:
        FileChangedError: the file was changed since it was opened.
    """
    descriptor = file.open()
    read = _scatter if _reads_gaps(run, pitch) else _read_alone
    read(file, descriptor.fd, offset, run, pitch, view)
    file.check_unchanged(descriptor)


def _reads_gaps(run: int, pitch: int) -> bool:
    gap = pitch - run
    return _CAN_SCATTER and (gap < _PAGE or (run < _PAGE and gap < _WIDEST_GAP))


def _runs_of_a_call(pitch: int) -> int:
    return max(1, min(_BUFFERS // 2, _CALL // pitch))


def _scatter(file: File, fd: int, offset: int, run: int, pitch: int, view: memoryview) -> None:
    gap = memoryview(bytearray(pitch - run))
    preadv = os.preadv
    at_once = run * _runs_of_a_call(pitch)
    for begin in range(0, len(view), at_once):
        starts = range(begin, min(len(view), begin + at_once), run)
        buffers = [gap] * (2 * len(starts))
        buffers[::2] = [view[start : start + run] for start in starts]
        buffers.pop()  # nothing is read beyond the last run
        position = offset + begin // run * pitch
        if preadv(fd, buffers, position) != len(starts) * pitch - len(gap):
            # a signal, or the end of the file
            _read_alone(file, fd, position, run, pitch, view[begin : begin + at_once])


def _read_alone(file: File, fd: int, offset: int, run: int, pitch: int, view: memoryview) -> None:
    if not _CAN_SCATTER:
        for number, start in enumerate(range(0, len(view), run)):
            file.read_into(view[start : start + run], offset + number * pitch)
        return
    preadv = os.preadv
    for start in range(0, len(view), run):
        if preadv(fd, (view[start : start + run],), offset) != run:
            file.read_into(view[start : start + run], offset)  # raises if the file ends, goes on otherwise
        offset += pitch
