"""The errors of this package; each is also the builtin exception that a caller would catch."""


class OffloadLayersError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(OffloadLayersError, ValueError):
    """A placement, a limit, a module map or an argument makes no sense; nothing was changed."""


class IllegalTransitionError(OffloadLayersError, RuntimeError):
    """A layer was asked to change to a state that cannot follow its own."""


class BudgetError(OffloadLayersError, MemoryError):
    """The books of a memory budget were misused: a second loan, or a loan given back twice."""


class BudgetExceededError(OffloadLayersError, MemoryError):
    """The device has no memory left for a layer, although every layer that could leave it has left."""


class VerificationError(OffloadLayersError, AssertionError):
    """A managed layer gave another result than the plain one."""


class MissingTensorError(OffloadLayersError, KeyError):
    """The source has no tensor for a parameter that has no values of its own."""

    def __str__(self) -> str:  # KeyError would print the quoted repr of its argument
        return str(self.args[0]) if self.args else ""


class ShapeMismatchError(OffloadLayersError, ValueError):
    """A tensor of the source has another shape than the parameter it is meant for."""
