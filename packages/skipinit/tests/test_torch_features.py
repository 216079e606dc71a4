"""Parts of torch that look into modules, tensors or the calls on them."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipinit import PendingValueError, skip_model_initialization, unmaterialized
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize


def built(build: Callable[[], nn.Module]) -> nn.Module:
    with skip_model_initialization():
        return build()


def loaded(model: nn.Module) -> nn.Module:
    """*model* with ones for everything that it misses."""
    state = {name: torch.ones(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


@pytest.mark.parametrize(
    ("norm", "missing"),
    [
        (parametrizations.weight_norm, ["original0", "original1"]),
        (parametrizations.spectral_norm, ["original"]),
        (parametrizations.orthogonal, ["original"]),
    ],
)
def test_parametrizations(norm: Callable[[nn.Module], nn.Module], missing: list[str]) -> None:
    torch.manual_seed(0)
    plain = norm(nn.Linear(4, 3))
    model = built(lambda: norm(nn.Linear(4, 3)))
    assert unmaterialized(model) == ["bias", *(f"parametrizations.weight.{name}" for name in missing)]
    model.load_state_dict(plain.state_dict(), assign=True)
    inputs = torch.ones(2, 4)
    torch.testing.assert_close(model.eval()(inputs), plain.eval()(inputs), rtol=0, atol=0)


def test_own_parametrization() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

        def right_inverse(self, weight: Tensor) -> Tensor:
            return weight / 2

    def build() -> nn.Module:
        linear = nn.Linear(3, 3)
        parametrize.register_parametrization(linear, "weight", Doubled())
        return linear

    assert loaded(built(build)).weight.detach().tolist() == [[2.0] * 3] * 3


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_hook_based_norms(norm: Callable[[nn.Module], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        plain = norm(nn.Linear(4, 3))
        model = built(lambda: norm(nn.Linear(4, 3)))
    assert set(unmaterialized(model)) == set(dict(plain.named_parameters()))
    assert not model.weight.is_meta  # an attribute, computed from the parameters
    assert model.weight.shape == (3, 4)


def test_fake_tensors_stay_what_the_mode_makes() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    with FakeTensorMode():
        plain = build()
        inside = built(build)
        assert inside(torch.empty(2, 3)).shape == (2, 3)
    with skip_model_initialization(), FakeTensorMode():
        outside = build()
    for model in (inside, outside):
        for mine, expected in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
            assert type(mine) is type(expected)
            assert mine.device == expected.device
            assert mine.shape == expected.shape


def test_lazy_modules_materialize_afterwards() -> None:
    model = built(lambda: nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
    assert model(torch.ones(2, 5)).shape == (2, 3)
    assert model[0].weight.device.type == "cpu"


def test_quantized_modules_hold_their_values() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = torch.ao.nn.quantized.dynamic.Linear(3, 3)
        model = built(lambda: torch.ao.nn.quantized.dynamic.Linear(3, 3))
    assert torch.equal(model.bias(), plain.bias())
    assert model.weight().shape == plain.weight().shape


def test_scripted_submodules() -> None:
    def build() -> nn.Module:
        return nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)), torch.jit.script(nn.Linear(3, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = built(build)
    assert unmaterialized(model) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert model[0].running_var.tolist() == [1, 1, 1]


def test_tracing_inside_a_block_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(PendingValueError, match="Trace the model after its weights are loaded"):
            built(lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))


def test_transforms_of_torch_func_are_refused() -> None:
    with pytest.raises(PendingValueError):
        built(lambda: torch.vmap(lambda x: x * 2)(torch.ones(3)))


@pytest.mark.slow
def test_compiled_functions_and_modules() -> None:
    @torch.compile(backend="eager")
    def table(x: Tensor) -> Tensor:
        return x * 2 + 1

    def build() -> nn.Module:
        linear = nn.Linear(3, 3)
        linear.tables = [table(torch.ones(3)), table(torch.arange(3.0))]
        return torch.compile(linear, backend="eager")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler warns that it does not compile what skipinit does
        model = built(build)
        output = loaded(model)(torch.ones(1, 3))
    assert [t.tolist() for t in model.tables] == [[3, 3, 3], [1, 3, 5]]
    assert output.tolist() == [[4, 4, 4]]


def test_custom_autograd_function() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

    with skip_model_initialization():
        doubled = Double.apply(torch.ones(3))
    assert doubled.tolist() == [2, 2, 2]


def test_inference_mode() -> None:
    with torch.inference_mode(), skip_model_initialization():
        model = nn.BatchNorm1d(3)
    assert model.weight.is_meta
    assert model.running_var.tolist() == [1, 1, 1]


def test_deepcopy_of_tensors_from_outside_and_inside() -> None:
    outside = torch.zeros(3)
    with skip_model_initialization():
        copies = copy.deepcopy([outside, torch.ones(2), outside])
    assert torch.equal(copies[0], outside)
    assert torch.equal(copies[1], torch.ones(2))
    assert copies[2] is copies[0]


def test_deepcopy_finds_nothing_under_ids_of_the_past() -> None:
    others = [torch.empty(0) for _ in range(1000)]
    memo: dict[int, Any] = {id(other): "its copy" for other in others}
    with skip_model_initialization():
        ones = copy.deepcopy(torch.ones(2), memo)
        others.clear()  # what is made next has their ids
    assert torch.equal(ones, torch.ones(2))


def test_deepcopy_and_pickle_afterwards() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file, weights_only=True)) == list(model.state_dict())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert unmaterialized(again) == unmaterialized(model)
        assert again[1].running_var.tolist() == [1, 1, 1]
        assert loaded(again)(torch.ones(2, 3)).shape == (2, 3)


def test_pickle_inside_a_block_holds_values() -> None:
    with skip_model_initialization():
        again = pickle.loads(pickle.dumps([nn.Parameter(torch.ones(2)), torch.zeros(2)]))
    assert [tensor.tolist() for tensor in again] == [[1, 1], [0, 0]]


def test_model_trains_after_loading() -> None:
    model = loaded(built(lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))))
    model(torch.arange(6.0).view(2, 3)).pow(2).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_assigned_state_dict_gives_the_plain_model() -> None:
    plain = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    model = built(lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True)).eval()
    model.load_state_dict(plain.state_dict(), assign=True)
    inputs = torch.randn(2, 3, 8)
    assert torch.equal(model(inputs), plain(inputs))


def test_weights_loaded_in_a_block_stay() -> None:
    with skip_model_initialization():
        state = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
        model = nn.Linear(2, 3, bias=False)
        model.load_state_dict(state, assign=True)
        tied = nn.Linear(2, 3, bias=False)
        tied.weight = model.weight
        model.to(torch.float64)
        again = nn.Linear(2, 3, bias=False)
        again.weight = model.weight
        copied = copy.deepcopy(model)
    expected = torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 2)
    for layer in (model, tied, again, copied):
        assert torch.equal(layer.weight, expected)
    assert model.weight is tied.weight is again.weight


def test_initial_values_loaded_in_a_block_are_skipped() -> None:
    def build() -> nn.Module:
        model = nn.Linear(2, 3)
        model.load_state_dict(nn.Linear(2, 3).state_dict(), assign=True)
        return model

    assert unmaterialized(built(build)) == ["weight", "bias"]


def test_lazy_module_loaded_in_a_block() -> None:
    state = nn.Linear(2, 3).state_dict()
    with skip_model_initialization():
        model = nn.LazyLinear(3)
        model.load_state_dict(state, assign=True)
    assert torch.equal(model.weight, state["weight"])
