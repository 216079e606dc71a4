"""A small model with every kind of layer, and the documented configurations."""

import gc
from collections.abc import Callable

import pytest
import torch
from offload_layers import AutoWrappedLinear, AutoWrappedModule, AutoWrappedNonRecurseModule
from offload_layers._budget import budget_of
from torch import Tensor, nn

WIDTH = 16


@pytest.fixture(scope="session")
def multiplies_fp8() -> Callable[[torch.device], bool]:
    """Whether this torch multiplies eight-bit floats, scaled by rows, on a device."""

    def multiplies(device: torch.device) -> bool:
        numbers = torch.ones(16, 16, device=device).to(FP8)
        scales = torch.ones(16, 1, device=device)
        try:
            torch._scaled_mm(
                numbers, numbers.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16
            )
        except RuntimeError:
            return False
        return True

    return multiplies


@pytest.fixture(scope="session")
def check_runs() -> Callable[[nn.Module, Tensor], None]:
    """Skip a test of a layer that torch itself cannot run, as 2.4 encoder layers under autocast on a CPU."""

    def check(layer: nn.Module, x: Tensor) -> None:
        try:
            with torch.no_grad():
                layer(x)
        except RuntimeError as error:
            pytest.skip(str(error))

    return check


class Norm(nn.Module):
    """A norm with a weight, a persistent buffer and a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))
        self.register_buffer("table", torch.arange(float(WIDTH)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.shift + self.table


class Block(nn.Module):
    """Own parameters beside children, one of which is read by its parent and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(WIDTH))
        self.norm = Norm()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.read = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gate * self.down(torch.relu(self.up(self.norm(x))))
        x = x + nn.functional.linear(x, self.read.weight, self.read.bias)
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class Net(nn.Module):
    """Two blocks, a root parameter, and modules which the map does not mention."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Parameter(torch.randn(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.rest = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.rest(x + self.root)  # type: ignore[no-any-return]


def config(
    offload: object, onload: object, preparing: object, computation: tuple[torch.dtype, object]
) -> dict[str, object]:
    """Return a vram_config from four (dtype, device) pairs, "disk" standing for both."""
    roles = {"offload": offload, "onload": onload, "preparing": preparing, "computation": computation}
    settings: dict[str, object] = {}
    for role, placement in roles.items():
        dtype, device = ("disk", "disk") if placement == "disk" else placement  # type: ignore[misc]
        settings |= {f"{role}_dtype": dtype, f"{role}_device": device}
    return settings


FP8 = torch.float8_e4m3fn
F32 = torch.float32

#: name -> (offload, onload, preparing) as functions of the compute device, all computing in float32
CONFIGURATIONS: dict[str, Callable[[object], dict[str, object]]] = {
    "cpu offload": lambda d: config((F32, "cpu"), (F32, "cpu"), (F32, d), (F32, d)),
    "onload on device": lambda d: config((F32, "cpu"), (F32, d), (F32, d), (F32, d)),
    "disk": lambda d: config("disk", "disk", "disk", (F32, d)),
    "disk, preparing": lambda d: config("disk", "disk", (F32, d), (F32, d)),
    "disk, onload on cpu": lambda d: config("disk", (F32, "cpu"), (F32, d), (F32, d)),
    "disk, onload on device": lambda d: config("disk", (F32, d), (F32, d), (F32, d)),
}


@pytest.fixture(params=list(CONFIGURATIONS))
def vram_config(request: pytest.FixtureRequest, device: torch.device) -> dict[str, object]:
    """Each documented configuration whose results are those of the plain model to the last bit."""
    return CONFIGURATIONS[request.param](device)


@pytest.fixture
def disk_config(device: torch.device) -> dict[str, object]:
    """Everything on disk until it computes."""
    return CONFIGURATIONS["disk"](device)


@pytest.fixture
def make_config() -> Callable[..., dict[str, object]]:
    return config


@pytest.fixture
def module_map() -> dict[type[nn.Module], type[nn.Module]]:
    return {
        nn.Linear: AutoWrappedLinear,
        Norm: AutoWrappedModule,
        nn.MultiheadAttention: AutoWrappedModule,
        Block: AutoWrappedNonRecurseModule,
    }


@pytest.fixture
def make_model() -> Callable[[], Net]:
    """Return a function that builds the same model each time."""

    def make() -> Net:
        torch.manual_seed(0)
        return Net().eval().requires_grad_(False)

    return make


@pytest.fixture
def make_skeleton(make_model: Callable[[], Net]) -> Callable[[], Net]:
    """Return a function that builds the model with all parameters on meta, and wrong persistent buffers."""

    def make() -> Net:
        model = make_model()
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            if isinstance(module, Norm):
                module.shift = torch.full_like(module.shift, float("nan"))
        return model

    return make


@pytest.fixture
def x(device: torch.device) -> Tensor:
    """Input of the model: (batch, tokens, width)."""
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def plain(make_model: Callable[[], Net], device: torch.device) -> Net:
    """The oracle: the same model, managed by nobody."""
    return make_model().to(device)


@pytest.fixture(autouse=True)
def _no_grad() -> object:
    with torch.no_grad():
        yield


_lent = 0  # by models that are alive longer than a test


@pytest.fixture(autouse=True)
def _books_without_garbage() -> None:
    """Models of other tests that refer to themselves are in the books, and may leave them at any time."""
    global _lent
    statistics = budget_of(torch.device("cpu")).statistics
    if statistics().lent_nbytes != _lent:
        gc.collect()
        _lent = statistics().lent_nbytes
