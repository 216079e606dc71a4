"""Build a PyTorch model without storing or computing the parameters that its checkpoint overwrites."""

from ._context import skip_model_initialization, suspended
from ._errors import NestedBlockError, PendingValueError, SkipinitError, UnmaterializedError
from ._materialized import check_materialized, unmaterialized

__all__ = [
    "NestedBlockError",
    "PendingValueError",
    "SkipinitError",
    "UnmaterializedError",
    "check_materialized",
    "skip_model_initialization",
    "suspended",
    "unmaterialized",
]
