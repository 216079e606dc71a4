"""DiffSynth-Studio's ``diffsynth.core.vram`` on three packages of its own, under every documented name.

Everything here is also importable from ``diffsynth.core`` where DiffSynth-Studio itself is not installed;
where it is, `install` makes it use this implementation.
"""

from diffsynth_core_vram._fit import CheckpointMismatchError
from diffsynth_core_vram._offload import offload
from diffsynth_core_vram._route import install, uninstall
from diffsynth_core_vram.core import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    AutoWrappedQuantizedModule,
    DiskMap,
    LoRAHotLoadMixin,
    enable_vram_management,
    enable_vram_management_recursively,
    fill_vram_config,
    load_model,
    load_state_dict,
    skip_model_initialization,
)

__all__ = [
    "AutoTorchModule",
    "AutoWrappedLinear",
    "AutoWrappedModule",
    "AutoWrappedNonRecurseModule",
    "AutoWrappedQuantizedModule",
    "CheckpointMismatchError",
    "DiskMap",
    "LoRAHotLoadMixin",
    "enable_vram_management",
    "enable_vram_management_recursively",
    "fill_vram_config",
    "install",
    "load_model",
    "load_state_dict",
    "offload",
    "skip_model_initialization",
    "uninstall",
]
