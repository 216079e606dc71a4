"""Where the memory of a tensor lies, and how to get it in as few steps as torch allows.

Note [Alignment]
    The kernel copies fastest where source and destination lie equally far from a cache line (measured on Zen
    4, 28 to 113 MB: 9.4 GB/s, otherwise 7.1), and a file has its tensors at any multiple of eight.  So large
    tensors of one or two bytes per element begin as far from a cache line as they do in the file.  Wider ones
    always begin a cache line, as torch's own do: the last bit of a float32 product can depend on that.  With
    narrow elements it does not, since every kernel widens them first.

Note [Aliasing]
    Processors of the AMD Zen family copy at a fifth of their speed where the destination lies a few bytes
    behind the source modulo 4096 (measured on Zen 4, kernel 6.18: 3 GB/s instead of 18, up to 40 bytes
    behind), because each store seems to overlap a load that follows.  The source of a read is the page cache,
    so its position modulo 4096 is that in the file; ours is a multiple of 64.  One tensor in 64 meets this,
    and gets memory elsewhere.
"""

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from safemap._buffers import array_type

_PAGE = 4096
CACHE_LINE = 64


class Blank:
    """A tensor without memory, and the type of its memory: what others of the same layout are made from.

    Making a tensor like another takes half the time of making it from dtype and shape, and the memory that
    torch gives it is aligned as torch's own kernels like it.
    """

    __slots__ = ("at", "template")

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> None:
        with no_dispatch():  # within a mode such as FakeTensorMode it would stay a fake one, for good
            self.template = torch.empty(shape, dtype=dtype, device="cpu")
            self.template.untyped_storage().resize_(0)
        #: address -> the memory there, as a buffer
        self.at = array_type(nbytes).from_address

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # layouts are pickled without it

    def elsewhere(self, tensor: Tensor, offset: int) -> Tensor:
        """Return a tensor to read into from *offset*: *tensor*, unless it lies badly; see Note [Aliasing]."""
        return torch.empty_like(self.template) if aliases(tensor.data_ptr(), offset) else tensor


def skip_for(dtype: torch.dtype, offset: int) -> int:
    """Return how far from a cache line a large tensor that is read from *offset* should begin."""
    if dtype.itemsize <= 2 and offset % dtype.itemsize == 0:
        return offset % CACHE_LINE  # Note [Alignment]
    return CACHE_LINE if aliases(0, offset) else 0


def aliases(address: int, offset: int) -> bool:
    """Tell whether reading from *offset* of a file to *address* would be slow; see Note [Aliasing]."""
    return 0 < (address - offset) % _PAGE < CACHE_LINE
