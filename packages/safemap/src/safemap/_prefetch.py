"""Bringing what will be read soon into the page cache, and into a mapping if there is one."""

import contextlib
from collections.abc import Sequence

from safemap._errors import SafemapError
from safemap._layout import Entry
from safemap._mapping import Mappings, bring_into_cache
from safemap._parallel import one_by_one
from safemap._readahead import CAN_ASK, ask_for, is_cached


def prefetch(stored: Sequence[Entry], parts: Sequence[Entry], mappings: Mappings | None) -> None:
    """Start bringing bytes of files closer, on another thread; without a kernel that can, do nothing.

    Args:
        stored: Tensors, which with *mappings* will be views.
        parts: What is read into memory in any case.
        mappings: None if there are no views.
    """

    def bring_in() -> None:
        with contextlib.suppress(SafemapError, OSError):  # a hint; reading will tell what is wrong
            for entry in read:  # looking again would find what the first look has made the kernel read
                if not bring_into_cache(entry):
                    _ask(entry)
            for entry in mapped:
                if mappings is not None and mappings.expects(entry) and not mappings.bring_in(entry):
                    _ask(entry)

    if not CAN_ASK:
        return
    whole = [*stored, *parts] if mappings is None else parts
    try:
        read = [entry for entry in whole if not _is_cached(entry)]
        mapped = [] if mappings is None else mappings.expect(stored)
    except (SafemapError, OSError):
        return
    if read or mapped:
        one_by_one(bring_in)


def _is_cached(entry: Entry) -> bool:
    """Tell whether a tensor need not be asked for: then no other thread has to be woken up."""
    file, layout, offset = entry
    return layout.nbytes == 0 or bool(is_cached(file, offset, offset + layout.nbytes))


def _ask(entry: Entry) -> None:
    file, layout, offset = entry
    ask_for(file, offset, offset + layout.nbytes)
