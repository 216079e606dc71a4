"""Many files, one table of names: duplicates, what an index promises, metadata."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from safemap._contents import Contents, open_contents
from safemap._errors import DuplicateTensorError, FormatError
from safemap._file import File
from safemap._layout import Entry
from safemap._paths import Files

OnDuplicate = Literal["error", "last"]


@dataclass(slots=True)
class Index:
    """Every name of a checkpoint; see ``Contents`` for the difference between *table* and *others*."""

    files: list[File] = field(default_factory=list)
    table: dict[str, Entry] = field(default_factory=dict)
    others: dict[Any, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def build_index(found: Files, *, on_duplicate: OnDuplicate, unwrap: bool) -> Index:
    """Open every file and merge their names.

    Raises:
        DuplicateTensorError: a name in two files, unless an index says whose it is or *on_duplicate* is
            ``"last"``.
        FormatError: a file breaks its format, or lacks a tensor that an index assigns to it.
    """
    index = Index()
    for path in found.paths:
        contents = open_contents(path)
        if unwrap:
            contents = contents.unwrapped()
        _drop_those_of_other_shards(contents, found)
        if on_duplicate == "error":
            _check_duplicates(index, contents)
        for name in contents.table.keys() & index.others.keys():
            del index.others[name]
        for name in contents.others.keys() & index.table.keys():
            del index.table[name]
        if index.table:
            index.table.update(contents.table)
        else:
            index.table = contents.table
        index.others.update(contents.others)
        index.metadata = _merge_metadata(index.metadata, contents.metadata)
        index.files.append(contents.file)
    _check_owners(index, found)
    return index


def _drop_those_of_other_shards(contents: Contents, found: Files) -> None:
    if contents.file.path not in found.indexes:
        return
    for names in (contents.table, contents.others):
        strangers = [
            name for name in names if found.owners.get(name, contents.file.path) != contents.file.path
        ]
        for name in strangers:
            del names[name]


def _check_owners(index: Index, found: Files) -> None:
    for name, path in found.owners.items():
        if name not in index.table and name not in index.others:
            raise FormatError(
                f'{found.indexes[path]}: says that tensor "{name}" is in {path}, but it is not. '
                "Index and shards are of different checkpoints: download both again."
            )


def _check_duplicates(index: Index, contents: Contents) -> None:
    if not index.files:
        return
    names = [
        name for name in (*contents.table, *contents.others) if name in index.table or name in index.others
    ]
    if names:
        name = names[0]
        before = f" and {index.table[name][0].path}" if name in index.table else " and a file before it"
        more = f" ({len(names) - 1:,} more names are in both)" if len(names) > 1 else ""
        raise DuplicateTensorError(
            f'tensor "{name}" is in {contents.file.path}{before}{more}. Pass the files of one checkpoint '
            'only, or on_duplicate="last" to let later files win.'
        )


def _merge_metadata(first: dict[str, str], second: dict[str, str]) -> dict[str, str]:
    """Merge metadata of shards: lists in JSON are united, anything else is taken from the later file."""
    merged = {**first, **second}
    for key in first.keys() & second.keys():
        lists = [_json_list(value) for value in (first[key], second[key])]
        if first[key] != second[key] and lists[0] is not None and lists[1] is not None:
            merged[key] = json.dumps(lists[0] + [item for item in lists[1] if item not in lists[0]])
    return merged


def _json_list(text: str) -> list[Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def searched(files: Sequence[File]) -> str:
    """Describe *files* for a message."""
    names = ", ".join(file.path for file in files[:3])
    return names if len(files) <= 3 else f"{names} and {len(files) - 3:,} more files"
