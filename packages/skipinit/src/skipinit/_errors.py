"""What can go wrong, each also the builtin that a caller would catch."""


class SkipinitError(Exception):
    """Base of every error of this package."""


class UnmaterializedError(SkipinitError, RuntimeError):
    """A model, or a state dict, that was to be run or saved still has tensors without values."""


class NestedBlockError(SkipinitError, ValueError):
    """A block was opened inside another one that puts parameters on a different device."""


class PendingValueError(SkipinitError, RuntimeError):
    """A tensor made in the block needs its value, but C++ code holds it, so it cannot be given one."""
