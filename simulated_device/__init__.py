"""A simulated accelerator for tests: a device of its own for torch, on which mistakes with streams show.

``install()`` compiles it, which takes a C++ compiler and a minute the first time, and makes it known to torch
as ``simulated``; ``torch.simulated`` is its module then, as ``torch.cuda`` is that of CUDA. What it does is
said in ``device.cpp``. What it cannot show is how long anything takes.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

NAME = "simulated"


class _Module(types.ModuleType):
    """``torch.simulated``: of ``torch.cuda`` what this repository and torch itself ask for."""

    def __init__(self, device: Any) -> None:
        super().__init__(f"torch.{NAME}")
        self.raw = device
        self._numbers = device.default_generator()

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def device(self, device: Any) -> Any:
        return nullcontext()  # there is one only

    def get_device_name(self, device: Any = None) -> str:
        return "simulated device"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    # -- streams

    def Stream(self, device: Any = None) -> torch.Stream:
        return torch.Stream(torch.device(NAME, 0))

    def Event(self) -> torch.Event:
        return torch.Event(torch.device(NAME, 0))

    def current_stream(self, device: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream(0)

    @contextmanager
    def stream(self, stream: torch.Stream) -> Iterator[None]:
        before = self.current_stream()
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    def synchronize(self, device: Any = None) -> None:
        torch.accelerator.synchronize(0)

    # -- memory

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.raw.memory()

    def memory_allocated(self, device: Any = None) -> int:
        return self.raw.allocated()

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.raw.peak()

    def memory_reserved(self, device: Any = None) -> int:
        return self.raw.reserved()

    def memory_stats_as_nested_dict(self, device: Any = None) -> dict[str, Any]:
        of_tensors = {"current": self.raw.allocated(), "peak": self.raw.peak(), "allocated": self.raw.ever()}
        return {
            "allocated_bytes": {"all": of_tensors},
            "reserved_bytes": {"all": {"current": self.raw.reserved()}},
        }

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.raw.reset_peak()

    def empty_cache(self) -> None:
        self.raw.empty_cache()

    def resize(self, nbytes: int = 1 << 36, *, others_nbytes: int = 1 << 26) -> None:
        """Let the device have so much memory, some of which other programs have."""
        self.raw.resize(nbytes, others_nbytes)

    def refuse_page_locked(self, refuses: bool) -> None:
        """Let the driver give no page-locked memory from now on, or give it again."""
        self.raw.refuse_page_locked(refuses)

    def take_races(self) -> list[str]:
        """Return what was used without order since the last call."""
        return self.raw.take_races()

    # -- random numbers

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self._numbers.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        self._numbers.set_state(state)

    def manual_seed_all(self, seed: int) -> None:
        self._numbers.manual_seed(seed)


def install() -> None:
    """Make the device known to torch; may be called once in a process, before torch has used a device."""
    from torch.utils.cpp_extension import load

    torch.utils.rename_privateuse1_backend(NAME)
    source = Path(__file__).with_name("device.cpp")
    extension = load(f"{NAME}_device", [str(source)], extra_cflags=["-O1"])
    torch._register_device_module(NAME, _Module(extension))
    torch.utils.generate_methods_for_privateuse1_backend()
