"""Keeping ``torch.compile`` out of what moves weights: locks, files and threads are not for a graph."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Return *function* as ``torch.compiler.disable`` does, which costs nothing until something is compiled.

    That decorator imports the whole compiler, more than a second, so it is applied at the first call
    after somebody else has imported it.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if disabled is None:
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*args)

    wrapper._torchdynamo_disable = True  # type: ignore[attr-defined]  # tracing ends before the wrapper
    return cast(Function, wrapper)
