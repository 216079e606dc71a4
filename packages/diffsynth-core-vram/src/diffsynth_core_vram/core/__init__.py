"""What DiffSynth-Studio documents under ``diffsynth.core``, as far as this distribution serves it."""

from diffsynth_core_vram.core.loader import load_model, load_state_dict
from diffsynth_core_vram.core.vram import (
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
    skip_model_initialization,
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
    "load_model",
    "load_state_dict",
    "skip_model_initialization",
]
