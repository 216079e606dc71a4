"""Watching the calls of a module without changing what it does.

Not by hooks: torch's own attention layers compute in another way, with other bits, when a module has any. A
compiled model runs such a module uncompiled.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from offload_layers._uncompiled import uncompiled

Forward = Callable[..., Any]
#: is given the forward of a module, and the arguments of a call; returns what the call is to return
Around = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def around_forward(module: nn.Module, around: Around) -> Iterator[None]:
    """Let each forward of *module* go through *around* in the block."""
    forward = module.forward
    own = module.__dict__.get("forward")  # somebody has put one of their own in the place of the class's

    @uncompiled
    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return around(forward, args, kwargs)

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        return call(args, kwargs)

    module.__dict__["forward"] = watched
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
