"""Layers that hold their weights on disk, in host memory or on the device, under a memory limit."""

from offload_layers._errors import (
    BudgetError,
    BudgetExceededError,
    ConfigError,
    IllegalTransitionError,
    MissingTensorError,
    OffloadLayersError,
    ShapeMismatchError,
    VerificationError,
)
from offload_layers._fact import PlanAndFact
from offload_layers._handle import Offloaded
from offload_layers._layer_sizes import LayerSize
from offload_layers._layers import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
)
from offload_layers._lora import LoRAHotLoadMixin
from offload_layers._offload import offload, plan
from offload_layers._placement import Placement, Policy
from offload_layers._plan import Plan, PlannedLayer, Prediction
from offload_layers._probe import probe
from offload_layers._quantized import AutoWrappedQuantizedModule
from offload_layers._rates import Rates
from offload_layers._replace import (
    disable_vram_management,
    enable_vram_management,
    enable_vram_management_recursively,
    fill_vram_config,
)
from offload_layers._report import LayerReport, Report, report, reset_counters
from offload_layers._state import State
from offload_layers._tier import Tier
from offload_layers._timeline import Interval, Sample, Timeline, recording
from offload_layers._verify import Difference, Verification, verify

__all__ = [
    "AutoTorchModule",
    "AutoWrappedLinear",
    "AutoWrappedModule",
    "AutoWrappedNonRecurseModule",
    "AutoWrappedQuantizedModule",
    "BudgetError",
    "BudgetExceededError",
    "ConfigError",
    "Difference",
    "IllegalTransitionError",
    "Interval",
    "LayerReport",
    "LayerSize",
    "LoRAHotLoadMixin",
    "MissingTensorError",
    "OffloadLayersError",
    "Offloaded",
    "Placement",
    "Plan",
    "PlanAndFact",
    "PlannedLayer",
    "Policy",
    "Prediction",
    "Rates",
    "Report",
    "Sample",
    "ShapeMismatchError",
    "State",
    "Tier",
    "Timeline",
    "Verification",
    "VerificationError",
    "disable_vram_management",
    "enable_vram_management",
    "enable_vram_management_recursively",
    "fill_vram_config",
    "offload",
    "plan",
    "probe",
    "recording",
    "report",
    "reset_counters",
    "verify",
]
