"""Memory for large tensors: huge pages, and used again once a tensor is gone.

Note [First touch]
    The kernel clears every page when it is first written.  For a tensor of 100 MB that takes longer than the
    read itself (measured: 2.5 GB/s into fresh memory, 6.7 into memory that was touched before). So large
    tensors lie in anonymous mappings, which get their pages in the fastest way (Note [Huge or small] in
    ``_first_touch``), and a mapping is lent again after its tensor died.

Note [How much is kept]
    What the pool holds beyond the tensors alive is at most ``slack`` bytes more than was once needed at the
    same time, and never more than one largest tensor (or ``slack``).  A buffer that serves a much smaller
    tensor gives its tail back.  So a loop over a checkpoint peaks at its largest tensor plus ``slack``,
    however often it runs.  Nothing tells the pool that the loop was the last one: that is what
    ``trim`` is for.
"""

import ctypes
import functools
import mmap
import sys
import weakref
from collections import deque

from torch import Tensor
from torch.autograd.graph import increment_version

from safemap._first_touch import first_touch
from safemap._locks import ForkSafe

MIB = 1 << 20
HUGE_PAGE = 2 * MIB
_CAN_MAP = sys.platform == "linux"


class _Buffer:
    """An anonymous mapping: its first ``touched`` bytes have pages, its ``resident`` ones may have them."""

    __slots__ = ("memory", "nbytes", "resident", "touched")

    def __init__(self, nbytes: int) -> None:
        self.memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.nbytes = self.resident = nbytes
        self.touched = 0

    def touch(self, nbytes: int, threads: int) -> None:
        """Get pages for the first *nbytes*."""
        if nbytes > self.touched:
            first_touch(self.memory, self.touched, nbytes, threads)
            self.touched = nbytes

    def trim(self, nbytes: int) -> None:
        """Give the pages behind the first *nbytes* back to the system; the range stays usable."""
        kept = round_up(nbytes, HUGE_PAGE)
        if kept < self.resident:
            self.memory.madvise(mmap.MADV_DONTNEED, kept, self.nbytes - kept)
            self.resident = kept
            self.touched = min(self.touched, kept)


class BufferPool(ForkSafe):
    """Lends memory and takes it back when nothing refers to it any more; see the notes above."""

    def __init__(self, slack: int = 32 * MIB) -> None:
        super().__init__()
        self.slack = slack
        self._largest = 0  # that was asked for
        self._free: list[_Buffer] = []
        # by the address of the reference, since one to writable memory has no hash
        self._lent: dict[int, tuple[weakref.ref[memoryview], _Buffer, int]] = {}
        self._returned: deque[weakref.ref[memoryview]] = deque()
        self._lent_nbytes = self._peak_nbytes = self._resident = 0

    @property
    def resident_nbytes(self) -> int:
        """Bytes that the pool accounts for, lent and free."""
        return self._resident

    def take(self, nbytes: int, skip: int = 0, threads: int = 1) -> memoryview | None:
        """Return *nbytes* of writable memory, or None where torch's own allocator must serve.

        The memory is lent until the view, and with it every tensor made from it, is gone.  It begins *skip*
        bytes after the start of a page.  New pages are got by *threads* threads.
        """
        if not _CAN_MAP:
            return None
        nbytes += skip
        with self._lock:
            self._largest = max(self._largest, round_up(nbytes, HUGE_PAGE))
            self._collect()
            self._peak_nbytes = max(self._peak_nbytes, self._lent_nbytes + nbytes)
            buffer = self._reuse(nbytes) or self._map(nbytes)
            self._lent_nbytes += nbytes
            view = memoryview(buffer.memory)[skip:nbytes]
            ref = weakref.ref(view, self._give_back)
            self._lent[id(ref)] = ref, buffer, nbytes
        buffer.touch(nbytes, threads)  # it is this thread's own now
        return view

    def trim(self) -> None:
        """Return all memory that is not lent to the system, now."""
        with self._lock:
            self._collect()
            self._shrink(0)

    def drop_free(self) -> None:
        """Return all memory that is not lent to the system, now and from now on."""
        with self._lock:
            self.slack = self._largest = 0
            self._collect()
            self._shrink(0)

    def _give_back(self, ref: "weakref.ref[memoryview]") -> None:
        # may run at any moment, even inside `take` of the same thread: so it never waits for the lock
        self._returned.append(ref)
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        if not self._returned:
            return
        while self._returned:
            _, buffer, nbytes = self._lent.pop(id(self._returned.popleft()))
            self._lent_nbytes -= nbytes
            self._free.append(buffer)
        self._shrink(max(self._largest, self.slack))

    def _shrink(self, limit: int) -> None:
        """Drop the free buffers that were returned first until at most *limit* bytes are free."""
        free = sum(buffer.resident for buffer in self._free)
        while self._free and free > limit:
            dropped = self._free.pop(0)
            free -= dropped.resident
            self._resident -= dropped.resident

    def _reuse(self, nbytes: int) -> _Buffer | None:
        fitting = [buffer for buffer in self._free if buffer.nbytes >= nbytes]
        if not fitting:
            return None
        buffer = min(fitting, key=lambda b: b.nbytes)
        self._free.remove(buffer)
        before = buffer.resident
        buffer.resident = max(before, round_up(nbytes, HUGE_PAGE))
        self._resident += buffer.resident - before
        if self._resident > self._peak_nbytes + self.slack:
            self._shrink(0)
        if self._resident > self._peak_nbytes + self.slack:
            before = buffer.resident
            buffer.trim(nbytes)
            self._resident -= before - buffer.resident
        return buffer

    def _map(self, nbytes: int) -> _Buffer:
        size = round_up(nbytes, HUGE_PAGE)
        room = self._peak_nbytes + self.slack - self._resident - size
        if room < 0:
            free = sum(buffer.resident for buffer in self._free)
            self._shrink(max(0, free + room))
        buffer = _Buffer(size)
        self._resident += size
        return buffer


def exact_memory(nbytes: int) -> memoryview | None:
    """Return memory for a tensor that stays, or None where torch's own allocator must serve.

    Not lent again, and not rounded up to huge pages: what is left over at its end lies in small ones.
    """
    if not _CAN_MAP:
        return None
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first_touch(memory, 0, nbytes)
    return memoryview(memory)


def round_up(nbytes: int, unit: int) -> int:
    """Return the smallest multiple of *unit* that is not below *nbytes*."""
    return -(-nbytes // unit) * unit


@functools.lru_cache(maxsize=4096)
def array_type(nbytes: int) -> type[ctypes.Array[ctypes.c_char]]:
    """Return the type of *nbytes* bytes of memory."""
    return ctypes.c_char * nbytes  # making the type takes longer than reading 100 KB


def has_plain_bytes(tensor: Tensor) -> bool:
    """Tell whether the bytes of *tensor* in memory, in order, are its elements.

    Those of a conjugate or negative view are what has to be flipped first.
    """
    is_flipped = tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not is_flipped


def assign(out: Tensor, tensor: Tensor) -> None:
    """Copy *tensor* to *out*, converting to its dtype."""
    # torch forgets to negate where it converts on the way to a negative view (seen in 2.13)
    out.copy_(tensor.to(out.dtype) if out.is_neg() else tensor)


def note_write(tensor: Tensor) -> None:
    """Tell autograd that the memory of *tensor* is being written to, as every operator of torch does.

    Otherwise a backward pass that saved the tensor would use the new values, silently.
    """
    if not tensor.is_inference():  # those have no version
        increment_version(tensor)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as writable bytes.

    The view does not keep the tensor alive: hold it.  (``tensor.numpy()`` would do, but torch works without
    numpy.)
    """
    if not has_plain_bytes(tensor):
        what = "a conjugate or negative view with" if tensor.is_conj() or tensor.is_neg() else "one with"
        raise ValueError(
            f"expected a contiguous CPU tensor; got {what} strides {tensor.stride()} on {tensor.device}"
        )
    array = array_type(tensor.numel() * tensor.element_size()).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")
