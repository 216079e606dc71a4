"""What one file of a checkpoint holds, whatever its format."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from safemap._errors import FormatError
from safemap._file import File
from safemap._header import LENGTH_BYTES, collector_paused, header_nbytes, parse_header
from safemap._layout import Entry
from safemap._paths import TORCH_SUFFIXES
from safemap._positional import read_bytes

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80\x02"  # protocol 2, which torch.save has always used
#: keys under which training scripts wrap a state dict
_WRAPPERS = ("state_dict", "module", "model_state")


@dataclass(frozen=True, slots=True)
class Stored:
    """Stands for a tensor within a nested container until it is read."""

    entry: Entry


@dataclass(slots=True)
class Contents:
    """The names of a file.

    Attributes:
        file: The open file.
        table: Name -> tensor that can be read alone.
        others: Name -> anything else that a pickled file may hold: containers (with ``Stored`` in place of
            tensors), numbers, tensors that could not be left on disk.
        metadata: Strings to strings; empty for pickled files.
    """

    file: File
    table: dict[str, Entry] = field(default_factory=dict)
    others: dict[Any, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def unwrapped(self) -> "Contents":
        """Return what is in the one wrapper that a training script put around its state dict, if it did."""
        if self.table or len(self.others) != 1:
            return self
        (key, inner) = next(iter(self.others.items()))
        if key not in _WRAPPERS or not isinstance(inner, Mapping):
            return self
        return from_tree(self.file, inner)


def from_tree(file: File, tree: object) -> Contents:
    """Sort the top level of an unpickled checkpoint."""
    if not isinstance(tree, Mapping):
        raise FormatError(
            f"{file.path}: holds a {type(tree).__name__}; expected a dict from names to tensors"
        )
    contents = Contents(file)
    for name, value in tree.items():
        if isinstance(value, Stored) and isinstance(name, str):
            contents.table[name] = value.entry
        else:
            contents.others[name] = value
    return contents


def map_leaves(tree: object, change: Callable[[Any], Any]) -> Any:
    """Return the containers of *tree* anew, with *change* applied to everything in them that is none."""
    if isinstance(tree, dict):
        changed = {key: map_leaves(value, change) for key, value in tree.items()}
        return changed if type(tree) is dict else _like(tree, changed)
    if type(tree) is list or type(tree) is tuple:
        return type(tree)(map_leaves(value, change) for value in tree)
    return change(tree)


def _like(original: dict[Any, Any], changed: dict[Any, Any]) -> dict[Any, Any]:
    result = original.copy()  # an OrderedDict or defaultdict stays one
    for key, value in changed.items():  # `update` would add to a Counter
        result[key] = value
    return result


def is_tensor_leaf(value: object) -> bool:
    """Tell whether *value* is, or stands for, one tensor."""
    return isinstance(value, (Stored, Tensor))


def open_contents(path: str) -> Contents:
    """Open a file and list what is in it; no tensor is read, except from legacy pickles."""
    file = File(path)
    descriptor = file.open()
    head = read_bytes(descriptor.fd, LENGTH_BYTES, 0)
    if not path.endswith(".safetensors"):
        if head.startswith(b"GGUF"):
            from safemap._gguf import read_gguf  # needed for such files only

            with collector_paused():
                table, metadata = read_gguf(file)
            return Contents(file, table=table, metadata=metadata)
        is_zip = head.startswith(_ZIP_MAGIC)
        if is_zip or (head.startswith(_PICKLE_MAGIC) and path.endswith(TORCH_SUFFIXES)):
            from safemap._torch_file import read_legacy, read_zip  # needed for pickled files only

            return from_tree(file, read_zip(file) if is_zip else read_legacy(file))
    return _open_safetensors(file, head)


def _open_safetensors(file: File, head: bytes) -> Contents:
    length = header_nbytes(head, file.nbytes, file.path)
    descriptor = file.open()
    raw = read_bytes(descriptor.fd, length, LENGTH_BYTES)
    file.check_unchanged(descriptor)
    with collector_paused():
        header = parse_header(raw, file.nbytes, file.path)
        entries = zip(itertools.repeat(file), header.layouts, header.offsets, strict=False)
        table = dict(zip(header.names, entries, strict=True))
    return Contents(file, table=table, metadata=header.metadata)
