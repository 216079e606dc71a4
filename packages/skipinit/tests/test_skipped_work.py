"""What ends as a parameter is neither stored nor computed: the shapes here need terabytes."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipinit import skip_model_initialization
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HUGE = 1_000_000  # squared, in float32: 4 TB

VALUES: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.empty(HUGE, HUGE),
    "randn": lambda: torch.randn(HUGE, HUGE),
    "rand_of_a_tuple": lambda: torch.rand((HUGE, HUGE), dtype=torch.bfloat16),
    "full": lambda: torch.full((HUGE, HUGE), 0.5),
    "scaled": lambda: torch.randn(HUGE, HUGE) / HUGE**0.5,
    "scaled_and_shifted": lambda: 0.02 * torch.randn(HUGE, HUGE) + 1,
    "turned": lambda: torch.randn(HUGE, HUGE).t(),
    "cast": lambda: torch.randn(HUGE, HUGE).to(torch.float16),
    "moved": lambda: torch.randn(HUGE, HUGE).to("cpu", torch.float16),
    "filled": lambda: torch.zeros(HUGE, HUGE).normal_(std=0.02),
    "joined": lambda: torch.cat([torch.zeros(1, HUGE), torch.randn(HUGE, HUGE)]),
    "like": lambda: torch.zeros_like(torch.randn(HUGE, HUGE)),
    "random_like": lambda: torch.randn_like(nn.Parameter(torch.empty(HUGE, HUGE))),
    "new": lambda: torch.ones(HUGE, HUGE).new_zeros(HUGE, HUGE),
    "new_of_sizes": lambda: torch.ones(HUGE, HUGE).new(HUGE, HUGE),
}

INITIALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform_": nn.init.uniform_,
    "normal_": nn.init.normal_,
    "constant_": lambda tensor: nn.init.constant_(tensor, 0.3),
    "ones_": nn.init.ones_,
    "zeros_": nn.init.zeros_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "xavier_normal_": nn.init.xavier_normal_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "trunc_normal_": lambda tensor: nn.init.trunc_normal_(tensor, std=0.02),
    "orthogonal_": nn.init.orthogonal_,
    "data.normal_": lambda tensor: tensor.data.normal_(),
    "data_of_a_row": lambda tensor: tensor.data[0].zero_(),
}


@pytest.mark.parametrize("name", VALUES)
def test_value_of_a_parameter_is_not_computed(name: str) -> None:
    model = nn.Module()
    with skip_model_initialization():
        model.weight = nn.Parameter(VALUES[name]())
    assert model.weight.is_meta


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializer_of_a_parameter_is_not_computed(name: str) -> None:
    model = nn.Module()
    with skip_model_initialization():
        model.weight = nn.Parameter(torch.empty(HUGE, HUGE))
        INITIALIZERS[name](model.weight)
    assert model.weight.is_meta


_ORDINARY = """
import sys, torch
from torch import nn
from skipinit import skip_model_initialization

before = set(sys.modules)
with skip_model_initialization():
    nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(4, 4), nn.Conv2d(4, 4, 1))
    nn.Parameter(torch.zeros_like(torch.randn(4)))
    nn.Parameter(torch.ones(4).new_zeros(2))
print(len(set(sys.modules) - before))
"""


def test_ordinary_calls_import_nothing() -> None:
    """Asked for the shape of some results on meta, torch imports hundreds of modules: half a second."""
    command = [sys.executable, "-c", _ORDINARY]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(found) == 0


def test_layers_of_any_size_are_built() -> None:
    with skip_model_initialization():
        model = nn.ModuleList(
            [nn.Linear(HUGE, HUGE), nn.Embedding(HUGE, HUGE, padding_idx=0), nn.LSTM(HUGE, HUGE)]
        )
        attention = nn.MultiheadAttention(HUGE, 2)
        normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(HUGE, HUGE))
        converted = nn.Linear(HUGE, HUGE).to(torch.bfloat16)
    for built in (model, attention, normed, converted):
        assert all(parameter.is_meta for parameter in built.parameters())


def test_initializers_give_their_distribution_when_the_value_is_read() -> None:
    with skip_model_initialization():
        weight = nn.Parameter(torch.empty(200, 200))
        nn.init.trunc_normal_(weight, mean=3.0, std=0.5, a=2.5, b=3.5)
        assert 2.5 <= float(weight.detach().min()) < float(weight.detach().max()) <= 3.5
        square = nn.init.orthogonal_(torch.empty(20, 20))
        half = nn.init.sparse_(torch.empty(10, 10), sparsity=0.5)
    torch.testing.assert_close(square @ square.T, torch.eye(20), atol=1e-5, rtol=0)
    assert int((half == 0).sum()) == 50


def test_linear_layer_gives_its_distribution_when_the_value_is_read() -> None:
    with skip_model_initialization():
        layer = nn.Linear(100, 200)
        assert "reset_parameters" not in vars(layer)
        weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    assert layer.weight.is_meta
    for values in (weight, bias):
        assert 0.095 < float(values.abs().max()) <= 0.1  # 1 / sqrt(100)
    assert float(weight.std()) == pytest.approx(0.1 / 3**0.5, rel=0.05)


def test_replaced_initializer_of_a_linear_layer_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, **_: shapes.append(tensor.shape))
    with skip_model_initialization():
        nn.Linear(2, 3)
    assert shapes == [(3, 2)]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: nn.init.kaiming_uniform_(nn.Parameter(torch.empty(3))),
        lambda: nn.init.xavier_uniform_(nn.Parameter(torch.empty(3))),
        lambda: nn.Parameter(torch.zeros(3)).normal_(),
        lambda: nn.Parameter(torch.zeros(3, dtype=torch.int64)),
        lambda: torch.randn(3, dtype=torch.int64),
        lambda: torch.ones(2, 3) @ torch.ones(2, 3),
        lambda: torch.empty(3, device="nonsense"),
        lambda: torch.zeros(2).view(3),
    ],
)
def test_mistakes_raise_what_they_raise_plainly(wrong: Callable[[], object]) -> None:
    with pytest.raises(Exception) as plain:  # noqa: PT011 (whatever torch raises)
        wrong()
    with skip_model_initialization(), pytest.raises(type(plain.value)) as mine:
        wrong()
    assert str(mine.value) == str(plain.value)


CONSTRUCTORS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(3, 4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "Embedding": lambda: nn.Embedding(9, 4, padding_idx=0),
    "Conv2d": lambda: nn.Conv2d(3, 4, 3),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "LSTM": lambda: nn.LSTM(4, 4),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2),
    "weight_norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
    **{name: lambda make=make: _holder(make()) for name, make in VALUES.items()},  # type: ignore[misc]
}


def _holder(value: Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(value)
    return module


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_common_constructors_need_no_search_of_the_heap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a fifth of a second in a process that has imported diffusers."""
    searches = []
    monkeypatch.setattr("skipinit._block.gc.get_objects", lambda: searches.append(name) or [])
    with skip_model_initialization():
        model = CONSTRUCTORS[name]()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not searches


def test_linear_layers_announce_no_initializer() -> None:
    """Six calls of torch functions for every layer would be most of what a large model takes."""
    announced: list[str] = []

    class Listen(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
        ) -> Any:
            announced.append(function.__name__)
            return function(*arguments, **(keywords or {}))

    with skip_model_initialization(), Listen():
        nn.Linear(3, 4)
    assert not {"kaiming_uniform_", "uniform_"} & set(announced)
