"""``torch.compile`` on managed models: equal results, and whole graphs where nothing has to be moved."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from offload_layers import AutoWrappedLinear, AutoWrappedModule, enable_vram_management, recording, verify
from offload_layers.testing import CountingSource
from torch import nn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.version_info >= (3, 14), reason="the compiler may not support this Python yet"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning"),  # on Python 3.13.0
]
RESTING = ("offload", "onload", "preparing")
CPU: dict[str, Any] = {"computation_device": "cpu", "computation_dtype": torch.float32}
DISK = {f"{role}_{what}": "disk" for role in RESTING for what in ("dtype", "device")} | CPU


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    config: Any = torch._dynamo.config
    inlines = getattr(config, "inline_inbuilt_nn_modules", True)  # torch 2.4 has to be told
    with contextlib.nullcontext() if inlines else config.patch(inline_inbuilt_nn_modules=True):
        yield


@pytest.mark.parametrize("config", [CPU, DISK], ids=["resident", "disk"])
def test_results_are_equal(config: dict[str, Any]) -> None:
    source = dict(plain().state_dict()) if config is DISK else None
    model = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, config, None, source)
    compiled: Callable[..., Any] = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 8)
    for _ in range(3):
        assert torch.equal(compiled(x), plain()(x))


def test_a_resident_model_is_one_graph() -> None:
    model = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, CPU)
    compiled: Callable[..., Any] = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8)
    assert torch.equal(compiled(x), plain()(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.skipif(torch.__version__ < "2.6", reason="the compiler may make other graphs")
@pytest.mark.parametrize(
    ("face", "kinds"), [({Block: AutoWrappedModule}, 1), ({nn.Linear: AutoWrappedLinear}, 2)], ids=["1", "2"]
)
def test_layers_that_move_are_compiled_once_for_each_kind(face: dict[Any, Any], kinds: int) -> None:
    torch.manual_seed(0)
    oracle = nn.Sequential(*(Block() for _ in range(3))).requires_grad_(False)
    model = enable_vram_management(copy.deepcopy(oracle), face, DISK, None, dict(oracle.state_dict()))
    graphs: list[Any] = []

    def backend(graph: Any, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Callable[..., Any] = torch.compile(model, backend=backend)
    x = torch.randn(2, 8)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x), oracle(x))
    assert len(graphs) == kinds


def test_watched_calls_run_uncompiled() -> None:
    source = CountingSource(plain().state_dict())
    model = enable_vram_management(plain(), {nn.Linear: AutoWrappedLinear}, DISK, None, source)
    compiled: Any = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 8)
    compiled(x)
    with recording(model) as timeline:
        assert torch.equal(compiled(x), plain()(x))
    assert [interval.name for interval in timeline.intervals] == ["0", "2"]
    found = verify(compiled, x)
    assert (found.layers_checked, found.differences) == (2, ())
    assert torch.equal(compiled(x), plain()(x))
