"""Labels for the profiler: transfers under the names of their layers.

The reader's thread is shown only by a profiler that was asked for all threads.
"""

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler


def is_profiling() -> bool:
    """Whether a profiler is running; asking costs next to nothing."""
    return profiler._is_profiler_enabled


def label(doing: str, layer: str) -> AbstractContextManager[object]:
    """Return a block that a running profiler shows as ``offload_layers: doing layer``."""
    return profiler.record_function(f"offload_layers: {doing} {layer}") if is_profiling() else nullcontext()
