"""From what the caller passes to a list of files: a file, shards, an index, a folder, a pattern."""

import glob
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from safemap._errors import FormatError, MissingFileError

PathLike = str | os.PathLike[str]
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
#: what a folder is searched for; the first kind found is taken
_FOLDER_CONTENTS = (
    "*.safetensors.index.json",
    "*.safetensors",
    "*.bin.index.json",
    *(f"*{s}" for s in TORCH_SUFFIXES),
)


@dataclass(slots=True)
class Files:
    """The files of a checkpoint.

    Attributes:
        paths: Absolute paths, in the order in which they are read.
        owners: Tensor name -> absolute path of the shard that an index assigns it to.
        indexes: Shard -> index that names it, for messages.
    """

    paths: list[str] = field(default_factory=list)
    owners: dict[str, str] = field(default_factory=dict)
    indexes: dict[str, str] = field(default_factory=dict)


def find_files(path: PathLike | Iterable[PathLike]) -> Files:
    """Resolve *path*: a file, a ``*.index.json``, a folder, a glob pattern, or a list of those.

    Raises:
        MissingFileError: naming what is absent, and the index that asked for it.
        FormatError: an index that is no index.
        TypeError: *path* is neither a path nor a list of paths.
    """
    found = Files()
    for item in _as_paths(path):
        _add(found, item)
    return found


def _as_paths(path: PathLike | Iterable[PathLike]) -> Sequence[str]:
    items = [path] if isinstance(path, (str, os.PathLike)) else path
    if isinstance(items, bytes) or not isinstance(items, Iterable):
        raise TypeError(f"path must be a str, an os.PathLike or a list of them; got {type(path).__name__}")
    paths = []
    for item in items:
        try:
            text = os.fspath(item)
        except TypeError:
            text = None
        if not isinstance(text, str):
            raise TypeError(f"path must be a str, an os.PathLike or a list of them; found {item!r:.80}")
        paths.append(os.path.abspath(os.path.expanduser(text)))
    if not paths:
        raise MissingFileError("no files were given: the list is empty")
    return paths


def _add(found: Files, path: str) -> None:
    if os.path.isdir(path):
        for inner in _folder_contents(path):
            _add(found, inner)
    elif path.endswith(".index.json"):
        _add_index(found, path)
    elif not os.path.lexists(path) and glob.has_magic(path):
        matches = sorted(glob.glob(path))
        if not matches:
            raise MissingFileError(f"{path}: no file matches this pattern")
        for match in matches:
            _add(found, match)
    else:
        found.paths.append(path)


def _folder_contents(folder: str) -> list[str]:
    for pattern in _FOLDER_CONTENTS:
        matches = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
        if not matches:
            continue
        if pattern.endswith(".index.json") and len(matches) > 1:
            names = ", ".join(map(os.path.basename, matches))
            raise FormatError(f"{folder}: more than one index ({names}). Pass the one that is meant.")
        return matches
    raise MissingFileError(f"{folder}: a folder without weights; looked for {', '.join(_FOLDER_CONTENTS)}")


def _add_index(found: Files, path: str) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such index") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a valid index: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError(f'{path}: an index must have a "weight_map" from tensor names to file names')
    folder = os.path.dirname(path)
    shards = {
        shard: os.path.normpath(os.path.join(folder, shard)) for shard in sorted(set(weight_map.values()))
    }
    for shard, shard_path in shards.items():
        if os.path.isabs(shard) or os.path.relpath(shard_path, folder).startswith(os.pardir):
            raise FormatError(f'{path}: names the shard "{shard}", which is outside the folder of the index')
        if not os.path.exists(shard_path):
            count = sum(value == shard for value in weight_map.values())
            raise MissingFileError(
                f'{path}: the shard "{shard}", which holds {count:,} of {len(weight_map):,} tensors, is '
                "missing. "
                f"It should be at {shard_path}: download it again."
            )
        if shard_path not in found.indexes:
            found.paths.append(shard_path)
            found.indexes[shard_path] = path
    found.owners.update((name, shards[shard]) for name, shard in weight_map.items())
