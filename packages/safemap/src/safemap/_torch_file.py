"""Files of ``torch.save``: names to positions, through torch's own weights-only unpickler.

Since torch 1.6 such a file is a zip archive that stores every storage uncompressed: ``NAME/data.pkl`` holds
the structure, ``NAME/data/KEY`` the bytes.  The structure is unpickled with storages on the meta device, so
that strides and offsets come out of torch's own rebuilding.  Only ``data.pkl`` is read, and no code is run.
"""

import errno
import gc
import io
import os
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._weights_only_unpickler import Unpickler

from safemap._contents import Stored, map_leaves
from safemap._dtypes import CODES
from safemap._errors import FormatError, SafemapError
from safemap._file import File
from safemap._layout import Layout
from safemap._positional import read_bytes

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: lengths of its name and its extra field


_new_storage: Any = torch.UntypedStorage  # torch does not type their constructors
_new_typed_storage: Any = torch.storage.TypedStorage


_STORAGES = (torch.UntypedStorage, torch.storage.TypedStorage)
#: what is known to hold no tensors, and is in nearly every checkpoint
_PLAIN_TYPES = {type(None), bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device}
_CODE = (type, ModuleType, FunctionType, BuiltinFunctionType)


class _NotLazy(Exception):
    """The archive is in order, but holds something that has to be loaded by torch itself."""


def read_zip(file: File) -> Any:
    """Return the structure of a zip-format file, with ``Stored`` in place of tensors."""
    descriptor = file.open()
    try:
        with io.FileIO(os.dup(descriptor.fd)) as raw, zipfile.ZipFile(raw) as archive:
            return _Archive(file, archive).read()
    except _NotLazy as reason:
        return _load_whole(file, str(reason))
    except Exception as error:
        if not _tells_of_damage(error):
            raise
        raise FormatError(
            f"{file.path}: a damaged zip archive: {_described(error)}. Write or download it again."
        ) from error


def read_legacy(file: File) -> Any:
    """Return the structure of a file from before torch 1.6, with its tensors, which only come together."""
    return _load_whole(file, "it is in the format from before torch 1.6")


def _load_whole(file: File, reason: str) -> Any:
    warnings.warn(
        f"{file.path}: read as a whole, because {reason}. Convert it with `safemap convert` to read single "
        "tensors.",
        stacklevel=2,
    )
    descriptor = file.open()
    try:
        with open(os.dup(descriptor.fd), "rb") as raw:
            raw.seek(0)
            tree = torch.load(raw, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and the unpickler raise all kinds of errors on malformed input
        if not _tells_of_damage(error):
            raise
        raise _unpickling_error(file, error) from error
    file.check_unchanged(descriptor)
    return _mapped(file, tree, _plain)


def _tells_of_damage(error: Exception) -> bool:
    """Tell whether an error is about the contents of a file, not about the system, nor explained already."""
    if isinstance(error, OSError):
        return error.errno in (None, errno.EINVAL)  # of a seek to where no position can be
    return not isinstance(error, (SafemapError, MemoryError))


def _described(error: Exception) -> str:
    return (
        _shown(error) if isinstance(error, zipfile.BadZipFile) else f"{type(error).__name__}: {_shown(error)}"
    )


def _mapped(file: File, tree: Any, change: Callable[[Any], Any]) -> Any:
    try:
        return map_leaves(tree, change)
    except RecursionError:
        raise FormatError(
            f"{file.path}: holds a container that contains itself, or containers nested more deeply than "
            "Python can follow; expected a dict from names to tensors. Save its state dict alone."
        ) from None


def _plain(leaf: Any) -> Any:
    """Return tensors without gradient, and with bytes that mean what they say."""
    return leaf.detach().resolve_conj().resolve_neg() if isinstance(leaf, Tensor) else leaf


def _holds_tensors(thing: object) -> bool:
    """Tell whether a tensor or a storage can be reached from an object of any kind."""
    pending, seen = [thing], {id(thing)}
    while pending:
        found = pending.pop()
        if isinstance(found, (Tensor, *_STORAGES)):
            return True
        for inner in gc.get_referents(found):
            if id(inner) not in seen and type(inner) not in _PLAIN_TYPES and not isinstance(inner, _CODE):
                seen.add(id(inner))
                pending.append(inner)
    return False


class _Archive:
    """Reads the structure of one archive."""

    def __init__(self, file: File, archive: zipfile.ZipFile) -> None:
        self.file = file
        self.archive = archive
        self.members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in self.members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise FormatError(f"{file.path}: a zip archive, but not one that torch.save writes (no data.pkl)")
        self.prefix = pickles[0].removesuffix("data.pkl")
        self.storages: dict[int, tuple[torch.UntypedStorage, str]] = {}  # address -> meta storage, its key

    def read(self) -> Any:
        if self.prefix + "constants.pkl" in self.members:
            raise FormatError(
                f"{self.file.path}: a TorchScript archive, which holds a program, not a state dict"
            )
        order = self.prefix + "byteorder"
        if order in self.members and self.archive.read(order).decode() != sys.byteorder:
            raise _NotLazy("it was written on a machine of the other byte order")
        pickled = io.BytesIO(self.archive.read(self.prefix + "data.pkl"))
        unpickler: Any = Unpickler(pickled, encoding="utf-8")
        unpickler.persistent_load = self._meta_storage
        # torch before 2.5 notes sparse tensors here, to check them at the end of its next load
        unchecked: list[Any] = getattr(torch._utils, "_sparse_tensors_to_validate", [])
        others = len(unchecked)
        try:
            tree = unpickler.load()
        except (NotImplementedError, RuntimeError) as error:
            if str(error).startswith("Unsupported "):  # torch before 2.5: an object that is no weight
                raise _unpickling_error(self.file, error) from error
            raise _NotLazy(
                f"torch cannot rebuild one of its tensors without data ({_shown(error)})"
            ) from error
        except _NotLazy:
            raise
        except Exception as error:  # the unpickler raises all kinds of errors on malformed input
            raise _unpickling_error(self.file, error) from error
        finally:
            del unchecked[others:]
        return _mapped(self.file, tree, self._stored)

    def _meta_storage(self, saved_id: tuple[Any, ...]) -> Any:
        kind, storage_type, key, _location, numel = saved_id
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown kind of persistent object {kind!r}")
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        storage = _new_storage(numel * dtype.itemsize, device="meta")
        self.storages[storage._cdata] = storage, key
        return _new_typed_storage(wrap_storage=storage, dtype=dtype, _internal=True)

    def _stored(self, leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            if type(leaf) not in _PLAIN_TYPES and _holds_tensors(leaf):
                raise _NotLazy(f"it holds tensors or their memory in an object of {type(leaf)}")
            return leaf
        if leaf.device.type != "meta":
            return leaf
        if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout != torch.strided or leaf.is_quantized:
            raise _NotLazy(f"it holds a {type(leaf).__name__} of layout {leaf.layout}")
        if leaf.is_conj() or leaf.is_neg():
            raise _NotLazy("it holds a conjugate or negative view")
        found = self.storages.get(leaf.untyped_storage()._cdata)
        if found is None:
            raise _NotLazy("one of its tensors has no storage in the archive")
        storage, key = found
        start = self._data_start(key, storage.nbytes()) + int(leaf.storage_offset()) * leaf.itemsize
        return Stored((self.file, _layout_of(leaf), start))

    def _data_start(self, key: str, nbytes: int) -> int:
        """Return where the bytes of a storage start in the file."""
        member = self.members.get(f"{self.prefix}data/{key}")
        if member is None:
            raise FormatError(f"{self.file.path}: the storage {key!r} is missing from the archive")
        if member.compress_type != zipfile.ZIP_STORED:
            raise _NotLazy("it is compressed")
        if member.file_size < nbytes:
            raise FormatError(
                f"{self.file.path}: the storage {key!r} has {member.file_size:,} bytes; its tensors need "
                f"{nbytes:,}"
            )
        descriptor = self.file.open()
        header = read_bytes(descriptor.fd, _LOCAL_HEADER.size, member.header_offset)
        if len(header) < _LOCAL_HEADER.size:
            raise FormatError(f"{self.file.path}: the archive ends within the storage {key!r}")
        start: int = member.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
        if start + nbytes > self.file.nbytes:
            raise FormatError(f"{self.file.path}: the archive ends within the storage {key!r}")
        return start


def _layout_of(tensor: Tensor) -> Layout:
    numel = tensor.numel()
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if numel else 0
    stride = None if tensor.is_contiguous() else tensor.stride()
    code = CODES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return Layout(code, tensor.dtype, tuple(tensor.shape), span * tensor.itemsize, stride)


def _shown(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _unpickling_error(file: File, error: Exception) -> FormatError:
    return FormatError(
        f"{file.path}: torch's weights-only loading refuses it ({type(error).__name__}: {_shown(error)}). It "
        "is damaged, or holds Python objects other than weights, which could run code: save its state dict "
        "alone."
    )
