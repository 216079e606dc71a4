"""Bringing what will be read soon into the page cache, and into a mapping if there is one."""

import contextlib
from collections.abc import Sequence

from safemap._errors import SafemapError
from safemap._layout import Entry
from safemap._mapping import Mappings
from safemap._parallel import in_background, one_by_one
from safemap._readahead import CAN_ASK, ask_for


def prefetch(stored: Sequence[Entry], parts: Sequence[Entry], mappings: Mappings | None) -> None:
    """Ask the kernel for bytes of files, in the background; without a kernel that can, do nothing.

    Args:
        stored: Tensors, which with *mappings* will be views.
        parts: What is read into memory in any case.
        mappings: None if there are no views.
    """

    def ask() -> None:
        with contextlib.suppress(SafemapError, OSError):  # a hint; reading will tell what is wrong
            for entry in (*asked, *parts):
                _ask(entry)

    def bring_in() -> None:
        with contextlib.suppress(SafemapError, OSError):
            for entry in expected:
                if mappings is not None and mappings.expects(entry) and not mappings.bring_in(entry):
                    _ask(entry)

    if not CAN_ASK:
        return
    asked = stored if mappings is None else ()
    expected = () if mappings is None else mappings.expect(stored)
    if asked or parts:
        in_background(ask)
    if expected:
        one_by_one(bring_in)


def _ask(entry: Entry) -> None:
    file, layout, offset = entry
    ask_for(file, offset, offset + layout.nbytes)
