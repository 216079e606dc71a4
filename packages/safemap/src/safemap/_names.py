"""What a name stands for, and what to say of it without reading: a place in a file, or a value."""

import difflib
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from safemap._contents import Stored
from safemap._errors import MissingTensorError
from safemap._file import File
from safemap._index import Index, searched
from safemap._layout import Entry, TensorInfo
from safemap._lazy_value import Computed

#: where a tensor is, how it is computed, or the tensor itself where its file had to be read as a whole
Found: TypeAlias = Entry | Tensor | Computed

_SUGGEST_AMONG = 20_000  # names; beyond that looking for similar ones takes seconds


def find(index: Index, name: str) -> Found:
    """Return what *name* stands for.

    Raises:
        MissingTensorError: there is no such name.
        TypeError: it stands for a number or a container.
    """
    entry = index.table.get(name)
    if entry is not None:
        return entry
    value = index.others.get(name)
    if isinstance(value, (Tensor, Computed)):
        return value
    if isinstance(value, Stored):
        return value.entry
    if name in index.others:
        raise TypeError(f'"{name}" of {searched(index.files)} is a {type(value).__name__}, not a tensor')
    raise missing(index, name)


def missing(index: Index, name: object) -> MissingTensorError:
    """Return the error about a name that is not there, with similar ones."""
    near: list[str] = []
    if isinstance(name, str) and len(index.table) <= _SUGGEST_AMONG:
        near = difflib.get_close_matches(name, list(index.table), 3)
    hint = f" Closest: {', '.join(f'{n!r}' for n in near)}." if near else ""
    files = len(index.files)
    return MissingTensorError(
        f'no tensor "{name}" in {searched(index.files)} ({files:,} file{"s" * (files != 1)}, '
        f"{len(index.table) + len(index.others):,} names).{hint}"
    )


def info_of(name: str, found: Found, files: Sequence[File]) -> TensorInfo:
    """Describe a tensor as it is stored."""
    if isinstance(found, Tensor):
        path = files[0].path if len(files) == 1 else ""
        return TensorInfo(found.dtype, found.shape, nbytes_of(found), path, None)
    if isinstance(found, Computed):
        return found.info()
    file, layout, offset = found
    dtype = layout.read_dtype(name, file.path)
    encoding = None if layout.blocks is None else layout.code
    return TensorInfo(dtype, torch.Size(layout.shape), layout.nbytes, file.path, offset, encoding)


def nbytes_of(found: Found) -> int:
    """Return how many bytes reading takes."""
    if isinstance(found, Computed):
        return found.nbytes()
    if not isinstance(found, Tensor):
        return found[1].nbytes
    return found.nbytes if found.layout == torch.strided else sum(part.nbytes for part in _parts(found))


def _parts(sparse: Tensor) -> tuple[Tensor, ...]:
    """Return what a sparse tensor consists of."""
    if sparse.layout == torch.sparse_coo:
        return sparse._indices(), sparse._values()
    if sparse.layout in (torch.sparse_csr, torch.sparse_bsr):
        return sparse.crow_indices(), sparse.col_indices(), sparse.values()
    return sparse.ccol_indices(), sparse.row_indices(), sparse.values()


def entries_of(found: Iterable[Found]) -> tuple[list[Entry], list[Entry]]:
    """Return what has to be read from files: stored tensors, and what others are made of."""
    stored: list[Entry] = []
    parts: list[Entry] = []
    for one in found:
        if isinstance(one, Computed):
            parts += one.entries()
        elif not isinstance(one, Tensor):
            stored.append(one)
    return stored, parts
