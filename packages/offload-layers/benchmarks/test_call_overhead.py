"""What a call of a managed layer costs more than a call of the plain one."""

from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, AutoWrappedModule
from torch import nn

RESTING = ("offload", "onload", "preparing")
CPU: dict[str, Any] = {"computation_device": "cpu", "computation_dtype": torch.float32}
DISK: dict[str, Any] = {f"{role}_{what}": "disk" for role in RESTING for what in ("dtype", "device")} | CPU


def source() -> dict[str, torch.Tensor]:
    return dict(nn.Linear(4, 4).state_dict())


LAYERS = {
    "plain": lambda: nn.Linear(4, 4),
    "resident AutoWrappedLinear": lambda: AutoWrappedLinear(nn.Linear(4, 4), **CPU),
    "resident AutoWrappedModule": lambda: AutoWrappedModule(nn.Linear(4, 4), **CPU),
    "staged from a dict": lambda: AutoWrappedLinear(nn.Linear(4, 4), **DISK, disk_map=source()),
}


@pytest.mark.benchmark(group="one call of a 4x4 linear layer")
@pytest.mark.parametrize("kind", LAYERS)
def test_call(benchmark: Any, kind: str) -> None:
    layer, x = LAYERS[kind](), torch.randn(1, 4)
    with torch.no_grad():
        benchmark(layer, x)
