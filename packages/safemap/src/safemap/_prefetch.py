"""Bringing what will be read soon into the page cache, and into a mapping if there is one."""

import contextlib
from collections.abc import Sequence

from safemap._errors import SafemapError
from safemap._layout import Entry
from safemap._mapping import Mappings
from safemap._parallel import in_background
from safemap._readahead import CAN_ASK, ask_for


def prefetch(stored: Sequence[Entry], parts: Sequence[Entry], mappings: Mappings | None) -> None:
    """Ask the kernel for bytes of files, in the background; without a kernel that can, do nothing.

    Args:
        stored: Tensors, which with *mappings* will be views.
        parts: What is read into memory in any case.
        mappings: None if there are no views.
    """

    def work() -> None:
        with contextlib.suppress(SafemapError, OSError):  # a hint; reading will tell what is wrong
            for entry in stored:
                if mappings is None or not mappings.bring_in(entry):
                    _advise(entry)
            for entry in parts:
                _advise(entry)

    if mappings is not None:
        stored = [entry for entry in stored if mappings.lacks(entry)]
    if CAN_ASK and (stored or parts):
        in_background(work)


def _advise(entry: Entry) -> None:
    file, layout, offset = entry
    ask_for(file, offset, offset + layout.nbytes)
