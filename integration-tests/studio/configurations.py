"""Where weights are: the configurations that DiffSynth-Studio documents, computing on the CPU."""

from typing import Any

import torch

FP8 = torch.float8_e4m3fn


def _config(dtype: torch.dtype, offload: Any, onload: Any, preparing: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"computation_dtype": dtype, "computation_device": "cpu"}
    for role, where in (("offload", offload), ("onload", onload), ("preparing", preparing)):
        config[f"{role}_dtype"] = where
        config[f"{role}_device"] = where if where in (None, "disk") else "cpu"
    return config


#: name -> dtype of the computation -> vram_config
CONFIGURATIONS = {
    "none": lambda dtype: _config(dtype, None, dtype, dtype),
    "cpu offload": lambda dtype: _config(dtype, dtype, dtype, dtype),
    "fp8 storage": lambda dtype: _config(dtype, FP8, FP8, FP8),
    "dynamic limit": lambda dtype: _config(dtype, "disk", "disk", dtype),
    "disk": lambda dtype: _config(dtype, "disk", "disk", dtype),
    "disk, memory": lambda dtype: _config(dtype, "disk", dtype, dtype),
    "disk, preparing": lambda dtype: _config(dtype, "disk", "disk", dtype),
}

#: name -> how many bytes the model has -> vram_limit
LIMITS = {"dynamic limit": lambda nbytes: nbytes / 2 / 2**30, "disk": lambda nbytes: 0}


def limit_of(name: str, nbytes: int) -> float | None:
    """Return the ``vram_limit`` that belongs to a configuration, for a model of so many bytes."""
    return LIMITS[name](nbytes) if name in LIMITS else None
