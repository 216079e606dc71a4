"""A progress bar over what is read from a checkpoint."""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]


class Watched(Mapping[str, Tensor]):
    """A checkpoint that shows on a progress bar how much of it has been read, while the ``with`` block lasts.

    The bar counts bytes, goes to standard error, and is shown only where that is a terminal.
    """

    def __init__(self, source: Mapping[str, Tensor], title: str) -> None:
        self._source = source
        self._title = title
        self._bar: Any = None

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._source[name]
        if self._bar is not None and isinstance(tensor, Tensor):
            self._bar.update(_nbytes(lambda: tensor))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def info(self, name: str) -> Any:
        """Return an object with ``dtype`` and ``shape``: the source's description, or the tensor itself."""
        info = getattr(self._source, "info", None)
        return self._source[name] if info is None else info(name)

    def trim(self) -> None:
        """Let the source give back memory that it keeps for the next read."""
        getattr(self._source, "trim", lambda: None)()

    def __enter__(self) -> "Watched":
        self._bar = tqdm(
            desc=self._title,
            total=sum(_nbytes(partial(self.info, name)) for name in self._source),
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _nbytes(find: Callable[[], Any]) -> int:
    """Return how many bytes a tensor has; zero for what is no tensor, and for a sparse one: torch refuses."""
    try:
        return int(getattr(find(), "nbytes", 0))
    except (RuntimeError, TypeError):
        return 0
