"""``diffsynth.core.vram.layers``, served by ``offload_layers``.

DiffSynth-Studio's module maps name these classes by the dotted path of this module.
"""

from offload_layers import (
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
    "LoRAHotLoadMixin",
    "enable_vram_management",
    "enable_vram_management_recursively",
    "fill_vram_config",
]
