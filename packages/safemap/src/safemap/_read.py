"""From a place in a file to a tensor: memory, threads, conversion and device in one pass.

Note [One call]
    For a tensor up to ``DIRECT`` bytes the cost is that of the calls more than of the bytes.  It is read by
    one system call in the calling thread, and checked by another (Note [Changed files] in ``_file``).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safemap._blank import skip_for
from safemap._buffers import MIB, BufferPool, assign, bytes_of, has_plain_bytes, note_write
from safemap._cast import check_cast, read_cast
from safemap._errors import MismatchError, UnsupportedTensorError
from safemap._file import File
from safemap._gguf_blocks import decode_into, rows_of
from safemap._layout import Entry, Layout
from safemap._mapping import Mappings
from safemap._parallel import for_each
from safemap._readahead import ReadAhead
from safemap._slice import Cuts, contiguous_run, ranges_nbytes, read_ranges

DIRECT = 2 * MIB
# from here on memory comes from the pool: malloc would also lend touched memory again, up to 32 MiB, but in a
# heap that small tensors fragment (measured: 120 MB more after a sweep)
POOLED = 4 * MIB
CHUNK = 8 * MIB  # what one thread reads at a time, at most
_LEAST_CHUNK = 1 * MIB  # and at least: handing over takes as long as reading 100 KB
_ASK = 512 << 10  # bytes; the kernel reads ahead that much without being asked
_SMALL = 32 << 10  # bytes; below that Note [Aliasing] costs less than looking
_preadv = getattr(os, "preadv", None)
_fstat = os.fstat
_empty_like = torch.empty_like


def crosses_from_locked(device: torch.device) -> bool:
    """Say whether page-locked memory is there for *device*, and makes copies to it faster."""
    if not hasattr(torch, "accelerator"):  # before 2.6
        return device.type == "cuda"
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and device.type == accelerator.type != "mps"


def cross(host: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Bring *host* to *device* as it is, and to *dtype* there: torch would convert first, on the host."""
    return host.to(device).to(dtype)


@dataclass(frozen=True, slots=True)
class Target:
    """What a tensor should be like once read: ``dtype`` None means as stored."""

    device: torch.device
    dtype: torch.dtype | None = None
    pin_memory: bool = False

    @property
    def is_plain(self) -> bool:
        """True if the bytes of the file are the result."""
        return self.device.type == "cpu" and self.dtype is None and not self.pin_memory


class Reader:
    """Reads tensors of any file into memory of its own; threads may share it."""

    def __init__(
        self, target: Target, pool: BufferPool, threads: int, mapped_elements: int | None = None
    ) -> None:
        self.target = target
        self.pool = pool
        self.threads = threads
        self.mappings = None if mapped_elements is None else Mappings(mapped_elements)
        #: what views lie in, if what is read is left as a view
        self.views = self.mappings if target.device.type == "cpu" and not target.pin_memory else None
        self._ahead = ReadAhead()
        self._is_plain = target.is_plain and self.mappings is None
        self._direct = DIRECT if self._is_plain and _preadv is not None else -1

    def read(self, name: str, entry: Entry) -> Tensor:
        """Return the tensor in new memory, in the dtype and on the device of the target."""
        file, layout, offset = entry
        nbytes = layout.nbytes
        if 0 < nbytes <= self._direct:  # Note [One call]
            blank = layout._blank or layout.blank()
            if blank is not None:
                tensor = _empty_like(blank.template)
                if nbytes > _SMALL:
                    tensor = blank.elsewhere(tensor, offset)
                    if nbytes >= _ASK:
                        self._ahead.before(file, offset, nbytes)
                descriptor = file.descriptor or file.open()
                descriptor.recently_used = True
                fd = descriptor.fd
                if _preadv(fd, (blank.at(tensor.data_ptr()),), offset) != nbytes:  # type: ignore[misc]
                    file.read_into(bytes_of(tensor), offset)
                status = _fstat(fd)
                if status.st_mtime_ns != file.mtime_ns or status.st_size != file.nbytes:
                    file.check_unchanged(descriptor)
                return tensor
        elif self._is_plain and nbytes and layout.stride is None and layout.dtype is not None:
            self._ask(file, offset, nbytes)
            tensor, view = self._allocate(layout.dtype, layout.shape, nbytes, offset)
            self._read_bytes(file, offset, view)
            return tensor
        return self._read_any(name, entry)

    def read_into(self, name: str, entry: Entry, out: Tensor) -> None:
        """Fill *out*, converting to its dtype; its shape must be that of the tensor."""
        file, layout, offset = entry
        dtype = layout.read_dtype(name, file.path)
        _check_destination(name, layout.shape, dtype, out)
        with torch.no_grad():
            if not has_plain_bytes(out) or layout.stride is not None:
                out.copy_(self._read_host(name, entry, out.dtype, pin=crosses_from_locked(out.device)))
                return
            note_write(out)  # before, since a read that fails may have written some of it
            self._ask(file, offset, layout.nbytes)
            if layout.blocks is not None:
                self._decode(name, entry, out.detach())
            else:
                self._fill(file, offset, dtype, out.detach())

    def copy_into(self, name: str, tensor: Tensor, out: Tensor) -> None:
        """Do what ``read_into`` does with a tensor that is in memory."""
        _check_destination(name, tuple(tensor.shape), tensor.dtype, out)
        with torch.no_grad():
            assign(out, tensor)

    def read_ranges(self, name: str, entry: Entry, cuts: Cuts) -> Tensor:
        """Return ``tensor[start:stop, ...]``, in the dtype and on the device of the target."""
        file, layout, _ = entry
        if layout.stride is not None:  # its parts do not lie together
            return _own_part(self._read_any(name, entry), _slices(cuts))
        if layout.blocks is not None:
            rows = self._read_any(name, rows_of(entry, cuts))
            return _own_part(rows, _within(cuts, rows, layout))
        part = self._part(cuts, layout.torch_dtype(name, file.path))
        self.read_ranges_into(name, entry, cuts, part)
        return self.finish(name, part)

    def read_ranges_into(self, name: str, entry: Entry, cuts: Cuts, out: Tensor) -> None:
        """Fill *out*, of the shape of the part, converting to its dtype."""
        file, layout, offset = entry
        if layout.stride is not None:
            out.copy_(self._read_host(name, entry, out.dtype, pin=False)[_slices(cuts)])
            return
        if layout.blocks is not None:
            rows = self._read_host(name, rows_of(entry, cuts), out.dtype, pin=False)
            out.copy_(rows[_within(cuts, rows, layout)])
            return
        stored = layout.torch_dtype(name, file.path)
        run = contiguous_run(layout.shape, cuts)
        if not has_plain_bytes(out) or (run is None and out.dtype != stored):
            part = self._part(cuts, stored, pin=crosses_from_locked(out.device))
            self.read_ranges_into(name, entry, cuts, part)
            assign(out, part)
            return
        note_write(out)
        if run is not None:
            start = offset + run[0] * stored.itemsize
            self._ask(file, start, out.numel() * stored.itemsize)
            self._fill(file, start, stored, out)
        else:
            read_ranges(file, offset, stored, layout.shape, cuts, out)

    def ranges_nbytes(self, name: str, entry: Entry, cuts: Cuts) -> int:
        """Return how many bytes reading a part takes."""
        file, layout, _ = entry
        if layout.stride is not None:
            return layout.nbytes
        if layout.blocks is not None:
            return rows_of(entry, cuts)[1].nbytes
        return ranges_nbytes(layout.torch_dtype(name, file.path), layout.shape, cuts)

    def _part(self, cuts: Cuts, dtype: torch.dtype, *, pin: bool = False) -> Tensor:
        extents = [stop - start for start, stop, _ in cuts]
        return self.allocate(math.prod(extents), dtype, pin=pin).view(extents)

    def allocate(self, numel: int, dtype: torch.dtype, *, pin: bool = False) -> Tensor:
        """Return uninitialized memory on the CPU, flat; large tensors lie in the pool."""
        if pin or not numel:
            try:
                return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=pin)
            except RuntimeError:  # the system limits how much may be page-locked
                if not pin or self.target.pin_memory:
                    raise
        return self._allocate(dtype, (numel,), numel * dtype.itemsize)[0]

    def read_parts(self, parts: Sequence[tuple[File, int, Tensor]], stored: torch.dtype) -> None:
        """Fill flat CPU tensors from positions in files, converting from the dtype *stored*."""
        pieces: list[tuple[File, int, memoryview]] = []
        for file, offset, out in parts:
            if out.dtype != stored:
                read_cast(file, offset, stored, out, self.threads)
            elif out.numel():
                view = bytes_of(out)
                starts = range(0, len(view), CHUNK)
                pieces += [(file, offset + start, view[start : start + CHUNK]) for start in starts]

        def read_piece(number: int) -> None:
            file, offset, view = pieces[number]
            file.read_into(view, offset)

        for_each(read_piece, range(len(pieces)), self.threads)

    def finish(self, name: str, tensor: Tensor) -> Tensor:
        """Bring a tensor in memory to the dtype and device of the target."""
        target = self.target
        dtype = tensor.dtype if target.dtype is None else target.dtype
        check_cast(name, tensor.dtype, dtype)
        tensor = tensor.to(device=target.device, dtype=dtype)
        return tensor.pin_memory() if target.pin_memory and target.device.type == "cpu" else tensor

    def close(self) -> None:
        """Give back memory that is not in use."""
        self.pool.drop_free()
        if self.mappings is not None:
            self.mappings.drop()

    def _read_any(self, name: str, entry: Entry) -> Tensor:
        file, layout, offset = entry
        target = self.target
        stored = layout.read_dtype(name, file.path)
        dtype = stored if target.dtype is None else target.dtype
        check_cast(name, stored, dtype)
        if self.mappings is not None and layout.stride is None and layout.blocks is None:
            view = self.mappings.view(file, layout, stored, offset)
            if view is not None:
                return self.finish(name, view.view(layout.shape))
        if target.device.type == "cpu":
            return self._read_host(name, entry, dtype, pin=target.pin_memory)
        # the smaller of the two dtypes crosses the bus
        crossing = dtype if dtype.itemsize < stored.itemsize else stored
        host = self._read_host(name, entry, crossing, pin=crosses_from_locked(target.device))
        return cross(host, target.device, dtype)

    def _read_host(self, name: str, entry: Entry, dtype: torch.dtype, *, pin: bool) -> Tensor:
        file, layout, offset = entry
        stored = layout.read_dtype(name, file.path)
        if layout.stride is not None:
            span = Layout(layout.code, stored, (layout.nbytes // stored.itemsize,), layout.nbytes)
            return _with_strides(self._read_host(name, (file, span, offset), dtype, pin=pin), layout)
        self._ask(file, offset, layout.nbytes)  # before memory is got for it
        # flat first, since computing strides overflows for some shapes without elements: [0, 2**40, 2**40]
        flat = self.allocate(layout.numel, dtype, pin=pin)
        try:
            out = flat.view(layout.shape)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise UnsupportedTensorError(
                f'tensor "{name}" of {file.path} has shape {list(layout.shape)}, which torch cannot hold: '
                f"{error}"
            ) from None
        if layout.blocks is not None:
            self._decode(name, entry, out)
        else:
            self._fill(file, offset, stored, out)
        return out

    def _decode(self, name: str, entry: Entry, out: Tensor) -> None:
        """Read quantized blocks into a contiguous CPU tensor."""
        if out.numel():
            decode_into(name, entry, out.view(-1), self.threads)

    def _allocate(
        self, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int, offset: int = 0
    ) -> tuple[Tensor, memoryview]:
        """Return an uninitialized tensor, not empty, to be read from *offset*, and its bytes."""
        if nbytes >= POOLED:
            view = self.pool.take(nbytes, skip_for(dtype, offset), self.threads)
            if view is not None:
                return torch.frombuffer(view, dtype=dtype).view(shape), view
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        return tensor, bytes_of(tensor)

    def _fill(self, file: File, offset: int, stored: torch.dtype, out: Tensor) -> None:
        """Read into a contiguous CPU tensor, converting from the dtype *stored*."""
        if out.dtype != stored:
            read_cast(file, offset, stored, out.view(-1), self.threads)
        elif out.numel():
            self._read_bytes(file, offset, bytes_of(out))

    def _ask(self, file: File, offset: int, nbytes: int) -> None:
        """Ask the disk for what is about to be read."""
        if nbytes >= _ASK:
            self._ahead.before(file, offset, nbytes)

    def _read_bytes(self, file: File, offset: int, view: memoryview) -> None:
        """Fill *view*, in pieces spread over the threads if it is long."""
        if self.threads == 1 or len(view) <= POOLED:
            file.read_into(view, offset)
            return

        descriptor = file.open()

        def read_piece(piece: tuple[int, int]) -> None:
            start, stop = piece
            file.fill(descriptor, view[start:stop], offset + start)

        for_each(read_piece, _shrinking_pieces(len(view), self.threads), self.threads)
        file.check_unchanged(descriptor)


def _shrinking_pieces(nbytes: int, threads: int) -> list[tuple[int, int]]:
    """Return starts and stops of pieces: few of them, and yet all threads end at about the same time."""
    pieces, start = [], 0
    while start < nbytes:
        step = min(CHUNK, max(_LEAST_CHUNK, (nbytes - start) // threads))
        stop = min(nbytes, start + step)
        pieces.append((start, stop))
        start = stop
    return pieces


def _with_strides(elements: Tensor, layout: Layout) -> Tensor:
    """Give the elements of a stored span the strides that were saved.

    Where the span holds much more than the tensor, only the tensor is kept.
    """
    tensor = elements.as_strided(layout.shape, layout.stride or ())
    return tensor.clone() if elements.numel() > 2 * layout.numel else tensor


def _slices(cuts: Cuts) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop, _ in cuts)


def _within(cuts: Cuts, rows: Tensor, layout: Layout) -> tuple[slice, ...]:
    """Return what of *rows* a part is, after ``rows_of`` has cut the first dimension."""
    inside = _slices(cuts)
    return inside if tuple(rows.shape) == layout.shape else (slice(None), *inside[1:])


def _own_part(whole: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """Return a part that does not keep the memory of the whole."""
    part = whole[slices]
    return part if part.numel() == whole.numel() else part.clone()


def _check_destination(name: str, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor) -> None:
    if tuple(out.shape) != shape:
        raise MismatchError(f'tensor "{name}" has shape {list(shape)}; the destination has {list(out.shape)}')
    check_cast(name, dtype, out.dtype)
