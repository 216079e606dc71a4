"""A progress bar for what takes long, where tqdm is installed and somebody is looking."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
_DELAY_S = 2.0  # what is done by then shows no bar


def watched(items: Iterable[tuple[Item, int]], *, label: str, nbytes: int) -> Iterator[Item]:
    """Yield the items, counting the bytes that come with each once it is done with."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        for item, _ in items:
            yield item
        return
    # disable=None: no bar where the output is no terminal
    bar: Any = tqdm(total=nbytes, desc=label, unit="B", unit_scale=True, delay=_DELAY_S, disable=None)
    with bar:
        for item, size in items:
            yield item
            bar.update(size)
