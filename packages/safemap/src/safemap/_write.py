"""Writing a safetensors file tensor by tensor; the file appears under its name only when it is complete."""

import contextlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from safemap._buffers import bytes_of
from safemap._dtypes import CODES, unpack_shape
from safemap._errors import UnsupportedTensorError

Description = tuple[torch.dtype, tuple[int, ...]]

# Of the data, so that tensors begin a cache line and are copied faster; see Note [Alignment] in _blank.  The
# format asks for 8.
_ALIGNMENT = 64


def write_safetensors(
    path: str, tensors: Mapping[str, Description], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors to *path*, holding one of them at a time.

    Args:
        path: Replaced in one step at the end; on any error it is left as it was.
        tensors: Dtype and shape of every name; they are in the header, which comes first.
        read: Called once for each name; what it returns must be as described.
        metadata: Strings to strings.

    Raises:
        UnsupportedTensorError: a dtype, a layout or a name that the format does not have.
        ValueError: *read* returns something else than was described.
    """
    for name in tensors:
        _check_name(name)
    names = sorted(tensors, key=lambda name: (*_order(*tensors[name]), name))
    with _replacing(path) as file:
        file.write(_header(names, tensors, metadata))
        for name in names:
            tensor = read(name).detach().cpu()
            if tensor.layout != torch.strided:
                raise UnsupportedTensorError(
                    f'tensor "{name}" is {tensor.layout}, which safetensors files cannot hold'
                )
            tensor = tensor.contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != tensors[name]:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f'tensor "{name}" is {found}; it was described as {tensors[name]}')
            if tensor.numel():
                file.write(bytes_of(tensor))


def _check_name(name: object) -> None:
    """Refuse names that a header cannot hold; pickled files may have any object as a name."""
    is_text = isinstance(name, str) and name.encode(errors="replace").decode() == name
    if not is_text or name == "__metadata__":
        raise UnsupportedTensorError(f"{name!r} cannot be the name of a tensor in a safetensors file")


def _order(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bool, int]:
    """Sort whole cache lines first, which stay whole; then wide elements first, so that all are aligned."""
    return math.prod(shape) * dtype.itemsize % _ALIGNMENT != 0, -dtype.itemsize


def _header(names: list[str], tensors: Mapping[str, Description], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in names:
        dtype, shape = tensors[name]
        code = CODES.get(dtype)
        if code is None:
            raise UnsupportedTensorError(f'tensor "{name}" is {dtype}, which safetensors files cannot hold')
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": unpack_shape(code, shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """Give a new file beside *path* that takes its place at the end."""
    folder, name = os.path.split(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".part", dir=folder)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if hasattr(os, "umask"):
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # mkstemp lets only the owner read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
