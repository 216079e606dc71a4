"""``diffsynth.core.vram``: skipped initialization, lazy checkpoints, managed layers.

DiffSynth-Studio's own ``diffsynth.core`` takes everything listed here with a star import.
"""

from diffsynth_core_vram.core.vram.disk_map import DiskMap
from diffsynth_core_vram.core.vram.initialization import skip_model_initialization
from diffsynth_core_vram.core.vram.layers import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    AutoWrappedQuantizedModule,
    LoRAHotLoadMixin,
    enable_vram_management,
    enable_vram_management_recursively,
    fill_vram_config,
)

__all__ = [
    "AutoTorchModule",
    "AutoWrappedLinear",
    "AutoWrappedModule",
    "AutoWrappedNonRecurseModule",
    "AutoWrappedQuantizedModule",
    "DiskMap",
    "LoRAHotLoadMixin",
    "enable_vram_management",
    "enable_vram_management_recursively",
    "fill_vram_config",
    "skip_model_initialization",
]
