"""The names of what still waits for its values, and the error for whoever forgot it."""

import pytest
import torch
from skipinit import UnmaterializedError, check_materialized, skip_model_initialization, unmaterialized
from torch import nn


@pytest.fixture
def model() -> nn.Module:
    with skip_model_initialization():
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_names(model: nn.Module) -> None:
    assert unmaterialized(model) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert unmaterialized(model.state_dict()) == unmaterialized(model)
    model[0].load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, assign=True)
    assert unmaterialized(model) == ["1.weight", "1.bias"]
    assert unmaterialized(nn.Linear(2, 2)) == []


def test_every_name_of_a_tied_parameter_is_listed() -> None:
    with skip_model_initialization():
        model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
        model[1].weight = model[0].weight
    assert unmaterialized(model) == ["0.weight", "1.weight"]


def test_meta_buffers_are_listed(model: nn.Module) -> None:
    model.register_buffer("table", torch.empty(2, device="meta"))
    assert unmaterialized(model)[-1] == "table"


def test_error_message(model: nn.Module) -> None:
    with pytest.raises(UnmaterializedError) as caught:
        check_materialized(model)
    assert str(caught.value) == (
        'Sequential: 4 of 7 tensors have no values: "0.weight", "0.bias", "1.weight", "1.bias".\n'
        "    Load a checkpoint that has these names with load_state_dict(state_dict, assign=True) before the "
        "model is run or saved."
    )
    assert isinstance(caught.value, RuntimeError)


def test_long_lists_are_cut() -> None:
    with skip_model_initialization():
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(600)))
    with pytest.raises(UnmaterializedError, match=r"1,200 of 1,200 tensors .*\"3\.bias\" and 1,192 more\."):
        check_materialized(model)


def test_complete_model_passes(model: nn.Module) -> None:
    model.load_state_dict({name: torch.ones(t.shape) for name, t in model.state_dict().items()}, assign=True)
    check_materialized(model)
    check_materialized(model.state_dict())


def test_as_hooks(model: nn.Module) -> None:
    model.register_forward_pre_hook(check_materialized)
    with pytest.raises(UnmaterializedError, match="4 of 7"):
        model(torch.ones(2, 2))
    model.register_state_dict_pre_hook(check_materialized)
    with pytest.raises(UnmaterializedError, match="4 of 7"):
        model.state_dict()
