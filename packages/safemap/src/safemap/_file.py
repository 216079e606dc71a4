"""One file of a checkpoint: its identity, its descriptor, and reading at a position.

Note [Descriptors without locks]
    A descriptor is closed when the last reference to its ``Descriptor`` goes.  Whoever reads holds such a
    reference while it reads, so evicting or closing a file can never close a number under a reader's feet
    (the kernel could
    have given the number to another file by then: wrong bytes, silently), and no reader takes a lock.

Note [Changed files]
    After each read, size and modification time are compared with those at opening.  Afterwards, because the
    kernel
    sets the time before it changes the bytes: what a racing writer did to the bytes just read is seen.  A
    file that
    is replaced by renaming another over it stays readable: the descriptor keeps the old one alive.
"""

import errno
import os
import stat
import weakref
from typing import NamedTuple

from safemap._errors import ClosedMapError, FileChangedError, FormatError, MissingFileError
from safemap._locks import ForkSafe
from safemap._positional import read_at

# O_NONBLOCK: opening a FIFO must not wait for a writer; regular files ignore it
_FLAGS = os.O_RDONLY | sum(
    getattr(os, flag, 0) for flag in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY", "O_NOINHERIT")
)


_close = os.close  # by its own name: `os` may be gone when the interpreter exits


class Identity(NamedTuple):
    """What tells whether a file is still the one that was opened."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Identity":
        """Take the identity from a ``stat`` result."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Descriptor:
    """An open file descriptor; it is closed with the last reference to this object."""

    __slots__ = ("fd", "recently_used")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.recently_used = True

    def __del__(self) -> None:
        _close(self.fd)


class File:
    """A regular file, opened for reading; threads may share it.

    Attributes:
        path: Absolute path.
        identity: As of opening.
        descriptor: None while evicted; see ``open``.
    """

    __slots__ = ("__weakref__", "descriptor", "identity", "is_closed", "mtime_ns", "nbytes", "path")

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.is_closed = False
        self.descriptor: Descriptor | None = None
        self.identity = Identity(0, 0, 0, 0)
        descriptor, self.identity = self._open()
        self.nbytes, self.mtime_ns = self.identity.nbytes, self.identity.mtime_ns
        _OPEN_FILES.admit(self, descriptor)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open" if self.descriptor else "evicted"
        return f"<File {self.path!r} {state} {self.nbytes:,} bytes>"

    def open(self) -> Descriptor:
        """Return the descriptor, opening the file again if it was evicted.  Hold the result while reading."""
        descriptor = self.descriptor
        if descriptor is not None:
            descriptor.recently_used = True
            return descriptor
        if self.is_closed:
            raise ClosedMapError(f"{self.path}: the map was closed; open it again to read from it")
        descriptor, identity = self._open()
        if identity != self.identity:
            raise FileChangedError(_changed(self, identity))
        _OPEN_FILES.admit(self, descriptor)
        return descriptor

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill *view* with the bytes from *offset* on, and check that the file has not changed."""
        descriptor = self.open()
        self.fill(descriptor, view, offset)
        self.check_unchanged(descriptor)

    def fill(self, descriptor: Descriptor, view: memoryview, offset: int) -> None:
        """Fill *view*, a piece of what is to be read before `check_unchanged`."""
        if read_at(descriptor.fd, view, offset) != len(view):
            raise FileChangedError(
                f"{self.path}: ends before byte {offset + len(view):,}; it had {self.nbytes:,} bytes when "
                "it was opened. It was truncated since: write it again and open a new map."
            )

    def check_unchanged(self, descriptor: Descriptor) -> None:
        """Raise ``FileChangedError`` if the file was written to after opening; see Note [Changed files]."""
        status = os.fstat(descriptor.fd)
        if status.st_mtime_ns != self.mtime_ns or status.st_size != self.nbytes:
            raise FileChangedError(_changed(self, Identity.of(status)))

    def close(self) -> None:
        """Forget the descriptor; idempotent.  Reads under way in other threads end normally."""
        self.is_closed = True
        self.descriptor = None

    def _open(self) -> tuple[Descriptor, Identity]:
        try:
            descriptor = Descriptor(os.open(self.path, _FLAGS))
        except FileNotFoundError:
            raise MissingFileError(f"{self.path}: no such file") from None
        except PermissionError as error:
            if os.path.isdir(self.path):  # Windows
                raise FormatError(f"{self.path}: a directory, not a file") from None
            raise PermissionError(error.errno, f"{error.strerror}: not allowed to read", self.path) from None
        except OSError as error:
            raise explained(error, self.path) from None
        status = os.fstat(descriptor.fd)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(
                f"{self.path}: {_kind(status.st_mode)}, not a regular file; it cannot be read lazily"
            )
        return descriptor, Identity.of(status)


class OpenFiles(ForkSafe):
    """Bounds how many descriptors the process holds for checkpoints, whatever the number of shards.

    Second chance: a file that was read since the last eviction is passed over once.  Reading only sets a
    flag.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self._files: list[weakref.ref[File]] = []  # weak: dropping a map must close its files

    def __len__(self) -> int:
        return sum((file := ref()) is not None and file.descriptor is not None for ref in self._files)

    def admit(self, file: File, descriptor: Descriptor) -> None:
        """Let *file* hold *descriptor*, evicting others if there are too many."""
        evicted = []  # closed after the lock is released
        with self._lock:
            holders = [f for ref in self._files if (f := ref()) is not None]
            holders = [f for f in holders if f.descriptor is not None and f is not file]
            while len(holders) >= self.limit:
                oldest = holders.pop(0)
                held = oldest.descriptor
                if held is not None and held.recently_used:
                    held.recently_used = False
                    holders.append(oldest)
                    continue
                evicted.append(held)
                oldest.descriptor = None
            if not file.is_closed:
                file.descriptor = descriptor
                holders.append(file)
            self._files = [weakref.ref(holder) for holder in holders]


def explained(error: OSError, path: str) -> OSError:
    """Return *error* with its file, and with what to do if the process may not open more files."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return error
    return OSError(
        error.errno,
        f"{error.strerror}: the limit of this {'process' if error.errno == errno.EMFILE else 'system'} is "
        "reached. Raise it (`ulimit -n`), or read with mmap=False, which keeps few files open: before Python "
        "3.13 each mapped file has a descriptor of its own",
        path,
    )


def _default_limit() -> int:
    """A quarter of what the process may open, at most 128."""
    try:
        import resource
    except ImportError:  # Windows
        return 128
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 128 if soft == resource.RLIM_INFINITY else max(4, min(128, soft // 4))


_OPEN_FILES = OpenFiles(_default_limit())


def _changed(file: File, found: Identity) -> str:
    if (found.device, found.inode) != file.identity[:2]:
        what = "another file has taken its place"
    elif found.nbytes != file.nbytes:
        what = f"it had {file.nbytes:,} bytes and now has {found.nbytes:,}"
    else:
        what = "it was written to"
    return f"{file.path}: changed after it was opened: {what}. Open a new map once the file is complete."


def _kind(mode: int) -> str:
    kinds = [("a directory", stat.S_ISDIR), ("a FIFO", stat.S_ISFIFO), ("a socket", stat.S_ISSOCK)]
    return next((text for text, test in kinds if test(mode)), "a device")
