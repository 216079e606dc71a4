"""Progress of long reads: a bar where ``tqdm`` is installed, log lines where it is not."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOG_EVERY = 0.1  # of the whole


@contextmanager
def progress(
    label: str, total: int, *, enabled: bool, log: logging.Logger
) -> Iterator[Callable[[int], object]]:
    """Give a function to be called with the number of bytes done since the last call."""
    if not enabled:
        yield lambda nbytes: None
        return
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        yield _LoggedProgress(label, total, log).advance
        return
    with tqdm(total=total, desc=label, unit="B", unit_scale=True) as bar:
        yield bar.update


class _LoggedProgress:
    def __init__(self, label: str, total: int, log: logging.Logger) -> None:
        self._label, self._total, self._log = label, total, log
        self._done = 0
        self._logged = 0.0

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        share = self._done / self._total if self._total else 1.0
        if share - self._logged >= _LOG_EVERY or share >= 1.0:
            self._logged = share
            self._log.info("%s: %s of %s bytes", self._label, f"{self._done:,}", f"{self._total:,}")
