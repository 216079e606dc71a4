"""Keeping ``torch.compile`` out of what moves weights: locks, files and threads are not for a graph."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Return *function* as ``torch.compiler.disable`` does, at no cost where nothing is being compiled.

    That decorator imports the whole compiler, more than a second, and adds 20 µs to each call. So it is
    applied only where the compiler traces the wrapper, and takes ``is_compiling()`` for true.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        nonlocal disabled
        if not torch.compiler.is_compiling():
            return function(*args)
        if disabled is None:
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*args)

    wrapper._torchdynamo_disable = True  # type: ignore[attr-defined]  # tracing a caller ends before
    return cast(Function, wrapper)
