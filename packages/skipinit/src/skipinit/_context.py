"""`skip_model_initialization`, the public face of a block."""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

import torch

from ._block import Block
from ._errors import NestedBlockError, SkipinitError

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class skip_model_initialization:
    """Build models whose parameters hold no storage; everything else is what a plain construction gives.

    As a context manager or as a decorator of a function, plain or ``async``::

        with skip_model_initialization():
            model = Model()
        model.load_state_dict(state_dict, assign=True)

    It acts on the thread, and on the asyncio task, that opened it. Blocks may be nested: the inner ones join
    the outer one. One object may be used many times, also by several threads.

    Args:
        device: Where the parameters made in the block go. ``"meta"``: they have no values and no storage. On
            any other device they have the values of a plain construction: they are moved there one by one,
            and nothing is skipped.

    Raises:
        NestedBlockError: on entering a block inside one with another device.
    """

    def __init__(self, device: torch.device | str | int = "meta") -> None:
        if callable(device):
            raise TypeError(
                "skip_model_initialization got a function as its device. "
                "As a decorator it is written with parentheses: @skip_model_initialization()"
            )
        self.device = torch.device(device)

    def __enter__(self) -> None:
        outer = Block.current()
        if outer is None:
            Block(self.device).open()
        elif outer.device == self.device:
            outer.depth += 1
        else:
            raise NestedBlockError(
                f'skip_model_initialization("{self.device}") was entered inside a block for '
                f'"{outer.device}". '
                "The inner block joins the outer one, so both need the same device."
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block = Block.current()
        if block is None:
            raise SkipinitError(
                "skip_model_initialization was left by another thread, asyncio task or context"
            )
        if block.depth > 1:
            block.depth -= 1
        else:
            block.close(failed=kind is not None)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Run every call of *function* in a block."""
        if (
            isinstance(function, type)
            or inspect.isgeneratorfunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise TypeError(
                f"skip_model_initialization decorates functions, not the class or generator "
                f"{function.__qualname__}; use a with-block around the construction"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: P.args, **kwargs: P.kwargs) -> object:
                with self:
                    return await function(*args, **kwargs)

            return cast(Callable[P, R], run_async)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return run


#: those that this thread and task have entered, the latest last
_suspensions: contextvars.ContextVar[tuple[contextlib.AbstractContextManager[None], ...]] = (
    contextvars.ContextVar("skipinit_suspensions", default=())
)


class suspended(contextlib.ContextDecorator):
    """Work as if no block were open, in the block of a ``with`` or in a function that is decorated.

    This is for functions that load models, and may be called in a block by others::

        @suspended()
        def load(path):
            with skip_model_initialization():  # one of its own, which joins no other
                model = Model()
            model.load_state_dict(read(path), assign=True)
            return model

    What is made here is real, and stays so when the block around it ends. Tensors that are pending when it
    begins get their values, except parameters, which are on the meta device here. Without a block around it,
    it does nothing.

    Raises:
        PendingValueError: a value that is needed cannot be known.
        TypeError: a class, a generator or a coroutine function is decorated: those run later than called.
    """

    def __enter__(self) -> None:
        block = Block.current()
        entered = contextlib.nullcontext() if block is None else block.suspended()
        entered.__enter__()
        _suspensions.set((*_suspensions.get(), entered))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        *outer, entered = _suspensions.get()
        _suspensions.set(tuple(outer))
        entered.__exit__(kind, error, trace)

    def __call__(self, function: F) -> F:
        """Run every call of *function* as if no block were open."""
        kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if isinstance(function, type) or any(is_kind(function) for is_kind in kinds):
            raise TypeError(
                f"suspended decorates plain functions, not the class, generator or coroutine function "
                f"{getattr(function, '__qualname__', function)}; use a with-block in it"
            )
        return super().__call__(function)
