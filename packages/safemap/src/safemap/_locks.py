"""Locks that a forked child finds open.

A child has only the thread that forked.  A lock that another thread held at that moment would stay locked in
the child for ever.
"""

import os
import threading
import weakref


class ForkSafe:
    """Has a ``threading.Lock`` as ``_lock``, which is replaced in a forked child.

    The lock itself is what the object's methods use: taking it by way of another object would take longer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _OWNERS.add(self)


_OWNERS: "weakref.WeakSet[ForkSafe]" = weakref.WeakSet()


def _open_all() -> None:
    for owner in _OWNERS:
        owner._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_all)
