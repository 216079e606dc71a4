"""How one tensor lies in its file: the type that every format is translated to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from safemap._blank import Blank
from safemap._errors import UnsupportedTensorError

if TYPE_CHECKING:
    from safemap._file import File


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as it is stored; nothing of it has been read.

    Attributes:
        dtype: Dtype in the file.  ``torch_dtype`` of a map does not change it.
        shape: Shape of the tensor.
        nbytes: Bytes that reading it takes.
        file: Absolute path of the file that holds it.
        offset: Position of its first byte in that file; None where the file had to be read as a whole.
        encoding: Type of the quantized blocks that the file holds, which are read as *dtype*; None where
            the bytes of the file are those of *dtype*.
    """

    dtype: torch.dtype
    shape: torch.Size
    nbytes: int
    file: str
    offset: int | None
    encoding: str | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a tensor is quantized.

    Attributes:
        number: Type of the blocks, as GGUF numbers it.
        elements: Elements of a block.
        nbytes: Bytes of a block.
    """

    number: int
    elements: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Dtype, shape and size of stored tensors; shared by all tensors that agree in them.

    Attributes:
        code: Dtype as the file names it, for messages.
        dtype: None if the installed torch has no such dtype, or cannot hold it in this shape.
        shape: Shape of the torch tensor.
        nbytes: Bytes from the first element to the end of the last one.
        stride: In elements; None for the usual row-major order.  Pickled files keep the strides of what was
            saved.
        blocks: Of a quantized tensor, whose *dtype* is None: no torch dtype has such bytes, so whoever does
            not know about blocks refuses it.  It is read as float32.
    """

    code: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    nbytes: int
    stride: tuple[int, ...] | None = None
    blocks: Blocks | None = None
    _blank: Blank | None = field(default=None, init=False, repr=False, compare=False)

    def blank(self) -> Blank | None:
        """Return what row-major tensors of this layout are made from, None for others; made once."""
        if self._blank is None and self.dtype is not None and self.stride is None:
            object.__setattr__(self, "_blank", Blank(self.dtype, self.shape, self.nbytes))
        return self._blank

    def read_dtype(self, name: str, path: str) -> torch.dtype:
        """Return the dtype in which the tensor is read, unless another is asked for."""
        return self.torch_dtype(name, path) if self.blocks is None else torch.float32

    def torch_dtype(self, name: str, path: str) -> torch.dtype:
        """Return the dtype, or raise an error that names the tensor."""
        if self.dtype is None:
            raise UnsupportedTensorError(
                f'tensor "{name}" of {path} has dtype {self.code} and shape {list(self.shape)}, which torch '
                f"{torch.__version__} cannot hold. Use a newer torch, or convert the file to another dtype."
            )
        return self.dtype

    @property
    def numel(self) -> int:
        """Number of elements of the tensor, which with strides may be fewer or more than are stored."""
        return math.prod(self.shape)


#: one stored tensor: its file, its layout and the position of its first byte.  A plain tuple, because a
#: checkpoint with 50,000 names opens in the time that it takes to make this many objects
Entry = tuple["File", Layout, int]
