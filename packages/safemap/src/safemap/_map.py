"""``DiskMap``: a checkpoint as a mapping from names to tensors, each read when it is asked for."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from safemap._buffers import BufferPool
from safemap._contents import Stored, map_leaves
from safemap._converter import StateDictConverter, convert
from safemap._errors import ClosedMapError, FileChangedError
from safemap._file import Identity
from safemap._index import Index, OnDuplicate, build_index, searched
from safemap._layout import TensorInfo
from safemap._lazy_graph import View
from safemap._lazy_sources import Sources
from safemap._lazy_together import find_members, read_together
from safemap._lazy_value import Computed
from safemap._mapping import renewal_elements
from safemap._names import Found, entries_of, find, info_of, missing, nbytes_of
from safemap._parallel import default_threads
from safemap._parts import part_of
from safemap._paths import PathLike, find_files
from safemap._prefetch import prefetch
from safemap._read import Reader, Target
from safemap._slice import TensorSlice


class DiskMap(Mapping[str, Tensor]):
    """A checkpoint as a read-only mapping from names to tensors.

    Opening reads the headers; a tensor is read when it is asked for, into memory of its own, and forgotten.
    So ``map[name]`` twice gives two tensors, and changing one changes neither the other nor the file.

    Args:
        path: A file (safetensors, or ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` of torch), a ``*.index.json``, a
            folder, a glob pattern, or a list of those.
        device: Where tensors go: a name, an index or a ``torch.device``.
        torch_dtype: Every tensor is converted to it while it is read, integers too; None keeps what is
            stored.
        state_dict_converter: Called once with a dict of lazy tensors as they are stored; returns the state
            dict of the model.  Any function written for a real state dict will do: what it does with tensors
            is recorded, and done for a name when that name is asked for.
        buffer_size: With ``mmap=True``, how many elements may be read before the mapping is renewed, which
            gives its pages back (the system takes them by itself when it needs memory).  None: the
            environment variable ``DIFFSYNTH_DISK_MAP_BUFFER_SIZE``, or never.  Without ``mmap`` no effect.
        mmap: Give views of a private mapping of the file instead of memory of their own.  Fast, but a file
            that is truncated while a view is alive kills the process when the view is read.
        pin_memory: Give tensors in page-locked memory, which devices copy faster.  For ``device="cpu"``.
        on_duplicate: What to do about a name in two files: ``"error"``, or let the ``"last"`` file win.
        threads: How many threads read one large tensor.  None: as many as there are cores, at most four.
        unwrap: Look into the single key ``state_dict``, ``module`` or ``model_state`` of a pickled file.
        converter_read_limit: How many bytes the converter may read while it runs, for operations that need
            values.  None: any number.  Each such read is logged.

    Raises:
        MissingFileError: no such file, nothing in the folder, or a shard of the index is missing.
        FormatError: a file breaks the rules of its format.
        DuplicateTensorError: a name in two files.
        ConverterError: the converter failed, or does something that cannot be done name by name.

    Values that are no tensors (a pickled file may hold numbers and nested containers) are passed on as they
    are; their tensors are read with them.  Maps may be shared by threads, forked, and pickled: the copy opens
    the files again and refuses files that have changed.
    """

    def __init__(
        self,
        path: PathLike | Iterable[PathLike],
        device: str | int | torch.device = "cpu",
        torch_dtype: torch.dtype | None = None,
        state_dict_converter: StateDictConverter | None = None,
        buffer_size: int | None = None,
        *,
        mmap: bool = False,
        pin_memory: bool = False,
        on_duplicate: OnDuplicate = "error",
        threads: int | None = None,
        unwrap: bool = False,
        converter_read_limit: int | None = None,
    ) -> None:
        if torch_dtype is not None and not isinstance(torch_dtype, torch.dtype):
            raise TypeError(f"torch_dtype must be a torch.dtype or None; got {torch_dtype!r:.80}")
        if on_duplicate not in ("error", "last"):
            raise ValueError(f'on_duplicate must be "error" or "last"; got {on_duplicate!r:.80}')
        self.device = torch.device(device)
        self.torch_dtype = torch_dtype
        self.buffer_size = renewal_elements(buffer_size)
        self._options = {"mmap": mmap, "pin_memory": pin_memory, "threads": threads, "unwrap": unwrap}
        self._on_duplicate: OnDuplicate = on_duplicate
        self._files = find_files(path)
        index = build_index(self._files, on_duplicate=on_duplicate, unwrap=unwrap)
        self._converted = None
        if state_dict_converter is not None:
            self._converted = convert(
                Sources(index), state_dict_converter, self._threads(), converter_read_limit
            )
        self._adopt(index)

    def _adopt(self, index: Index) -> None:
        self._stored = index
        self._index = index if self._converted is None else self._converted.apply(index, self._sources)
        self._table, self._others = self._index.table, self._index.others
        self._reader = self._make_reader(BufferPool())
        self._is_closed = False

    def _make_reader(self, pool: BufferPool) -> Reader:
        return Reader(
            Target(self.device, self.torch_dtype, bool(self._options["pin_memory"])),
            pool,
            self._threads(),
            mapped_elements=self.buffer_size if self._options["mmap"] else None,
        )

    @functools.cached_property
    def _sources(self) -> Sources:
        return Sources(self._stored)

    def _threads(self) -> int:
        threads = self._options["threads"]
        return default_threads() if threads is None else max(1, threads)

    # ------------------------------------------------------------------ Mapping

    def __getitem__(self, name: str) -> Tensor:
        entry = self._table.get(name)
        if entry is not None:
            return self._reader.read(name, entry)
        return self._other(name)  # type: ignore[no-any-return]  # a container: only in pickled files

    def __contains__(self, name: object) -> bool:
        self._check_open()
        return name in self._table or name in self._others

    def __iter__(self) -> Iterator[str]:
        self._check_open()
        if self._others:
            if self._converted is not None:
                return iter(self._converted.state_dict)
            return iter([*self._table, *self._others])
        return iter(self._table)

    def __len__(self) -> int:
        self._check_open()
        return len(self._table) + len(self._others)

    def __eq__(self, other: object) -> bool:
        return self is other  # comparing values would read every tensor

    __hash__ = object.__hash__

    # ------------------------------------------------------------------ beyond Mapping

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape, size and place of a tensor as it is stored, without reading it."""
        return info_of(name, self._find(name), self._index.files)

    def nbytes(self, name: str) -> int:
        """Return how many bytes reading *name* takes."""
        return nbytes_of(self._find(name))

    def sizes(self) -> dict[str, int]:
        """Return names and ``nbytes`` of all tensors that can be read alone."""
        return {
            name: self.nbytes(name)
            for name in self
            if name in self._table or isinstance(self._others[name], Computed)
        }

    def read_into(self, name: str, out: Tensor) -> Tensor:
        """Read a tensor into *out*, without a temporary where *out* is contiguous and on the CPU.

        Args:
            name: Name of the tensor.
            out: Of the same shape; values are converted to its dtype, whatever ``torch_dtype`` of the map is.

        Returns:
            *out*.

        Raises:
            MismatchError: *out* has another shape, or a dtype that would drop the imaginary part.
        """
        entry = self._find(name)
        if isinstance(entry, Tensor):
            self._reader.copy_into(name, entry, out)
        elif isinstance(entry, Computed):
            entry.read_into(name, self._reader, out)
        else:
            self._reader.read_into(name, entry, out)
        return out

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Read several tensors, which share memory where those of a real state dict would.

        ``map[name]`` always gives a tensor of its own.  Here names that a converter (or a pickled file) tied
        get the same memory, and so do views of one tensor that overlap.  Parts that do not overlap, such as
        the parts of a split, stay apart.

        Args:
            names: What to read; None for everything.
        """
        wanted = list(self if names is None else names)
        for name in wanted:
            if name not in self:
                raise missing(self._index, name)
        outputs = self._sources.outputs() if self._converted is None else self._converted.state_dict

        def read_view(name: str, view: View) -> Tensor:
            return Computed(view, self._sources.places, "").read(name, self._reader)

        members = find_members(self._sources, outputs, wanted)
        shared = read_together(members, self.__getitem__, read_view, casts=self.torch_dtype is not None)
        return {name: shared[name] if name in shared else self[name] for name in wanted}

    def slice(self, name: str) -> TensorSlice:
        """Return a handle on a tensor; indexing it, as in ``map.slice(name)[i:j]``, reads only that part."""
        return TensorSlice(name, self.info(name), part_of(name, self._find(name), self._reader))

    def prefetch(self, names: Iterable[str]) -> None:
        """Start bringing tensors into the page cache; returns at once.  Purely a hint.

        With ``mmap=True`` their pages are mapped as well, on a thread that leaves the interpreter free, so
        that reading the views meets no page fault.  They count as resident memory from then on; see
        ``release``.
        """
        self._check_open()
        views, others = entries_of([find(self._index, name) for name in names])
        prefetch(views, others, self._reader.mappings)

    def renew(self, names: Iterable[str]) -> bool:
        """Make views that were read before as good as views that are read now; for maps with ``mmap=True``.

        A view takes no memory of its own, so there is no harm in keeping it.  Before it is used again, its
        file must be seen not to have changed, and what ``prefetch`` is still to bring in must be there.

        Args:
            names: Under which the views were read.

        Returns:
            False if they have to be read again: they are no views, or their mapping is renewed now and then
            (``buffer_size``), or the map was closed.

        Raises:
            FileChangedError: a file has changed since it was opened.
        """
        mappings = self._reader.views
        return mappings is not None and mappings.renew(map(self._table.get, names), self.torch_dtype)

    def release(self, names: Iterable[str]) -> None:
        """Let the pages of tensors go from this process' resident memory; for maps with ``mmap=True``.

        Views of them stay valid: what is read again comes back from the page cache, or from disk.  Pages that
        were written through a view are kept, so no value changes; but no other thread may be writing to these
        tensors meanwhile.  Pages that a tensor shares with its neighbours in the file are kept, too.  Without
        ``mmap``, or on a system that does not tell which pages were written, nothing happens.
        """
        views, _ = entries_of(map(self._find, names))
        if self._reader.mappings is not None:
            for entry in views:
                self._reader.mappings.let_go(entry)

    def trim(self) -> None:
        """Give back the memory that is kept for the next large tensor: as much as the largest one takes.

        For a map that lives on although nothing is to be read from it soon.  Tensors that were read stay
        valid, and the map stays open.
        """
        self._reader.pool.trim()

    def with_threads(self, threads: int) -> "DiskMap":
        """Return the same map over the same open files, whose large tensors are read by *threads* threads.

        For reading beside something else that needs the cores, where one thread is enough.
        """
        self._check_open()
        return self if self._options["mmap"] else self._twin(threads=threads)  # views are not read

    def owned(self) -> "DiskMap":
        """Return the same map over the same open files, which gives tensors in memory of their own.

        For what is to stay in memory, from a map with ``mmap=True``: the pages of a view stay only as long as
        the system has no better use for them.
        """
        self._check_open()
        return self._twin(mmap=False) if self._options["mmap"] else self

    def _twin(self, **options: Any) -> "DiskMap":
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        twin._options = {**self._options, **options}
        twin._reader = twin._make_reader(self._reader.pool)
        return twin

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the files; where shards differ, lists are united and the later file wins otherwise."""
        return MappingProxyType(self._index.metadata)

    @property
    def files(self) -> list[str]:
        """Absolute paths of the files, in the order in which they were read."""
        return [file.path for file in self._index.files]

    def close(self) -> None:
        """Close the files; idempotent.  Tensors that were read stay valid."""
        for file in self._index.files:
            file.close()
        self._reader.close()
        self._is_closed = True
        self._table = self._others = {}

    def __enter__(self) -> "DiskMap":
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._is_closed:
            return f"<DiskMap {searched(self._index.files)} closed>"
        dtype = f" as {self.torch_dtype}" if self.torch_dtype else ""
        return f"<DiskMap {searched(self._index.files)} {len(self):,} names on {self.device}{dtype}>"

    # ------------------------------------------------------------------ inside

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_open()
        state = {name: value for name, value in vars(self).items() if name in _PICKLED}
        return _reopen, (type(self), state, [(file.path, file.identity) for file in self._index.files])

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedMapError(
                f"{searched(self._index.files)}: the map was closed; open it again to read from it"
            )

    def _find(self, name: str) -> Found:
        self._check_open()
        return find(self._index, name)

    def _other(self, name: str) -> Any:
        """Return what is not in the table: containers, numbers, tensors of legacy files."""
        self._check_open()
        if name not in self._others:
            raise missing(self._index, name)

        def load(leaf: Any) -> Any:
            if isinstance(leaf, Stored):
                return self._reader.read(name, leaf.entry)
            if isinstance(leaf, Computed):
                return leaf.read(name, self._reader)
            return self._reader.finish(name, leaf.clone()) if isinstance(leaf, Tensor) else leaf

        return map_leaves(self._others[name], load)


#: attributes that describe a map; the rest is found again by opening the files
_PICKLED = ("device", "torch_dtype", "buffer_size", "_options", "_on_duplicate", "_files", "_converted")


def _reopen(cls: type[DiskMap], state: dict[str, Any], opened: list[tuple[str, Identity]]) -> DiskMap:
    """Open the files of a pickled map again; refuse them if they are not the same."""
    copy = cls.__new__(cls)
    vars(copy).update(state)
    index = build_index(copy._files, on_duplicate=copy._on_duplicate, unwrap=bool(copy._options["unwrap"]))
    for file, (path, identity) in zip(index.files, opened, strict=True):
        if file.identity != identity:
            raise FileChangedError(f"{path}: changed since the map was pickled. Open a new map.")
    copy._adopt(index)
    return copy
