"""Toy constructors, one per habit that real ones have: each must give exactly the plain model."""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def module(**entries: Any) -> nn.Module:
    """A module with these attributes, set in order."""
    made = nn.Module()
    for name, value in entries.items():
        setattr(made, name, value)
    return made


def with_buffer(value: Tensor, persistent: bool = True) -> nn.Module:
    made = nn.Module()
    made.register_buffer("buffer", value, persistent=persistent)
    return made


class TaggedParameter(nn.Parameter):
    pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8, bias=False))


class Rotary(nn.Module):
    def __init__(self, dim: int = 8, length: int = 16) -> None:
        super().__init__()
        frequencies = 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim))
        angles = torch.outer(torch.arange(length), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.complex = torch.polar(torch.ones_like(angles), angles)
        self.tables = {"both": [angles, (angles + 1,)]}


class Sinusoidal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        table = torch.zeros(10, 6)
        position = torch.arange(10).unsqueeze(1)
        scale = torch.exp(torch.arange(0, 6, 2) * (-math.log(10000.0) / 6))
        table[:, 0::2] = torch.sin(position * scale)
        table[:, 1::2] = torch.cos(position * scale)
        self.register_buffer("table", table.unsqueeze(0))
        self.fixed = nn.Embedding.from_pretrained(table)


class WindowMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        mask = torch.zeros(1, 8, 8, 1)
        count = 0
        for rows in (slice(0, -4), slice(-4, -2), slice(-2, None)):
            for columns in (slice(0, -4), slice(-4, -2), slice(-2, None)):
                mask[:, rows, columns, :] = count
                count += 1
        self.mask = mask.view(-1, 16)
        self.register_buffer("attention", self.mask.unsqueeze(1) - self.mask.unsqueeze(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, padding_idx=0)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.shared = self.again = nn.Linear(4, 4)


class Attributed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 2))
        self.weight.tensor_parallel = True
        self.weight.quantization = {"bits": 4}
        self.tagged = TaggedParameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.arange(3), requires_grad=False)
        self.small = nn.Parameter(torch.zeros(2, dtype=torch.float16))
        self.register_parameter("absent", None)


class ReadsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]
        weight = torch.full((4,), 2.0)
        if weight.sum() > 7:
            self.big = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.ones(3) * 3)
        self.total = float(self.weight.detach().sum())
        self.listed = self.weight.tolist()
        self.array = self.weight.detach().numpy().tolist()
        self.length = int(torch.ones(2, 3).sum())
        self.text = str(torch.zeros(2))


class Aliases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = torch.zeros(4, 4)
        self.row = self.base[1]
        self.base.fill_(3)
        self.row.add_(1)
        self.register_buffer("column", self.base[:, 0])
        self.copy = self.base.clone()
        self.base.mul_(2)
        self.turned = self.base.t()


class ReplacesData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.weight.data = torch.zeros(3, 3)
        self.weight.data.fill_(2)
        self.weight.data[1].zero_()
        self.other = nn.Parameter(torch.randn(6))
        self.other.data = torch.arange(6.0)
        with torch.no_grad():
            self.weight.copy_(torch.ones(3, 3))
            self.weight[0] = 5
        self.seen = self.weight.detach().clone()


class Deferred(nn.Module):
    """Arithmetic that ends as a parameter, and the same arithmetic that ends as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = nn.Parameter(torch.ones(3, 4) / 4**0.5)
        self.turned = nn.Parameter((torch.ones(3, 4) * 2).t())
        self.cast = nn.Parameter(torch.ones(3).to(torch.bfloat16))
        self.joined = nn.Parameter(torch.cat([torch.zeros(1), torch.ones(2)]))
        self.normal = nn.Parameter(F.normalize(torch.ones(4), dim=0))
        self.filled = nn.Parameter(torch.full((2, 2), 0.5, dtype=torch.float64))
        self.values = (torch.ones(3, 4) / 4**0.5, torch.zeros(2).add(1).half(), torch.full((3,), 7))
        self.more = torch.cat([torch.zeros(1), torch.ones(2)]).view(3, 1).expand(3, 2)
        self.new = [self.scaled.new([1.0, 2.0]), torch.ones(2).new()]
        self.like = [torch.zeros_like(self.cast), self.scaled.new_ones(2), torch.full_like(self.scaled, 3)]


class Initializes(nn.Module):
    """Deterministic initializers on attributes, so that values can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.init.eye_(torch.empty(3, 3))
        self.ones = nn.init.ones_(torch.empty(3))
        self.zeros = nn.init.zeros_(torch.empty(3))
        self.constant = nn.init.constant_(torch.empty(3), 0.3)
        self.dirac = nn.init.dirac_(torch.empty(3, 3, 3))


class Defaults(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            self.linear = nn.Linear(2, 2)
            self.attribute = torch.ones(2)
            self.register_buffer("third", torch.ones(2, dtype=torch.int64) / 3)
        finally:
            torch.set_default_dtype(before)


class AsksDevice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        other = torch.ones(2)
        self.device, self.on_meta = self.weight.device, (self.weight.is_meta, other.is_meta)
        self.flags = (other.is_cpu, self.weight.is_cuda, self.weight.get_device())
        self.register_buffer("there", torch.arange(2, device=self.weight.device))
        self.moved = torch.zeros(2).to("cpu").cpu()


class Clones(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.copied = copy.deepcopy(Block())
        self.values = copy.deepcopy([torch.ones(2), torch.zeros(1)])
        self.twice = copy.deepcopy([torch.ones(2)] * 2)


class Unregistered(nn.Module):
    """No checkpoint fills these, so they have values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.hidden = [nn.Parameter(torch.full((2,), 3.0))]
        self.settings = {"scale": nn.Parameter(torch.zeros(1), requires_grad=False)}


class Converts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block().to(torch.bfloat16)
        self.norm = nn.BatchNorm1d(4).half()
        self.linear = nn.Linear(2, 2).requires_grad_(False).eval()
        self.back = nn.Linear(2, 2).double().float().cpu()


class Explicit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.drawn = torch.randn(3, generator=generator)
        self.weight = nn.Parameter(torch.randn(3, generator=generator))
        self.after = torch.rand(2, generator=generator)
        out = torch.zeros(3)
        torch.full((3,), 4.0, out=out)
        self.out = out
        self.sparse = torch.zeros(2, 2).to_sparse().to_dense()
        self.channels = torch.empty(1, 2, 3, 3, memory_format=torch.channels_last).zero_()
        self.like = torch.ones_like(torch.empty(1, 2, 3, 3), memory_format=torch.channels_last)


class ExplicitInPlace(nn.Module):
    """What a generator gives later depends on what was drawn from it before."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.empty(3))
        self.weight.data.normal_(generator=generator)
        nn.init.uniform_(self.weight, generator=generator)
        self.after = torch.rand(2, generator=generator)


class Sequence(list[Any]):
    pass


class PartsOfData(nn.Module):
    """Parameters that are views of a computed tensor; their values are read."""

    def __init__(self) -> None:
        super().__init__()
        computed = torch.arange(12.0).view(3, 4)
        self.late, self.column = nn.Parameter(computed[1:]), nn.Parameter(computed[:, 2])
        self.read = [self.late.detach().clone(), self.column.detach() + 1, self.late.tolist()]
        self.stacked = torch.stack(Sequence([nn.Parameter(torch.ones(3)), self.column.detach()]))


class OwnReset(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.5)
        self.seen = self.weight.tolist()


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(3, 2))


class CountedLinear(nn.Linear, Counted):
    """The constructor of `nn.Linear` finds a parameter when it begins."""


class LinearVariants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counted = CountedLinear(2, 3, bias=False)
        self.count = self.counted.count.tolist()
        self.own = OwnReset(3, 2)
        self.plain = nn.Linear(3, 2, bias=False)
        self.again = nn.Linear(2, 2)
        self.again.reset_parameters()
        nn.init.ones_(self.again.weight)
        nn.init.zeros_(self.again.bias)
        self.values = [self.again.weight.detach().clone(), self.again.bias.tolist()]


class Seeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.register_buffer("projection", torch.randn(4, 2))
            self.more = torch.empty(3).normal_()
            self.drawn = [torch.randperm(5), torch.randint(10, (3,)), torch.rand(2)]


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(4)
        self.convolution = nn.LazyConv2d(2, 3)
        self.norm = nn.LazyBatchNorm1d()


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.linear = nn.Linear(3, 3)
        self.gone = nn.Parameter(torch.zeros(2))
        del self.gone
        self.weights = nn.ParameterList([torch.zeros(2), nn.Parameter(torch.ones(3))])
        self.named = nn.ParameterDict({"a": torch.zeros(2), "b": torch.ones(1)})


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 4),
    "block": Block,
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ConvTranspose1d(2, 2, 3), nn.GroupNorm(2, 4)
    ),
    "batch_norm": lambda: nn.Sequential(
        nn.BatchNorm1d(4), nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    ),
    "recurrent": lambda: nn.ModuleList(
        [nn.LSTM(3, 4, 2, bidirectional=True), nn.GRU(3, 4), nn.LSTMCell(2, 2)]
    ),
    "lstm_with_projection": lambda: nn.LSTM(3, 4, proj_size=2),
    "multihead_attention": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True),
    "bilinear_prelu": lambda: nn.Sequential(nn.Bilinear(2, 3, 4), nn.PReLU(2), nn.RMSNorm(3)),
    "rotary": Rotary,
    "sinusoidal": Sinusoidal,
    "window_mask": WindowMask,
    "tied": Tied,
    "attributed": Attributed,
    "reads_values": ReadsValues,
    "aliases": Aliases,
    "replaces_data": ReplacesData,
    "deferred": Deferred,
    "initializes": Initializes,
    "default_dtype": Defaults,
    "asks_device": AsksDevice,
    "clones": Clones,
    "unregistered": Unregistered,
    "converts": Converts,
    "explicit_generator_and_out": Explicit,
    "seeds": Seeds,
    "explicit_generator_in_place": ExplicitInPlace,
    "parts_of_data": PartsOfData,
    "linear_variants": LinearVariants,
    "lazy": Lazy,
    "dropped": Dropped,
    "plain_buffer": lambda: with_buffer(torch.zeros(2, 3)),
    "non_persistent_buffer": lambda: with_buffer(torch.ones(4), persistent=False),
    "causal_mask_buffer": lambda: with_buffer(torch.tril(torch.ones(4, 4)).view(1, 1, 4, 4)),
    "shared_buffer": lambda: (lambda b: module(a=with_buffer(b), b=with_buffer(b)))(torch.ones(2)),
    "empty_parameter": lambda: module(weight=nn.Parameter(torch.empty(0, 3))),
    "scalar_parameter": lambda: module(
        weight=nn.Parameter(torch.tensor(2.5)), scale=nn.Parameter(torch.zeros(()))
    ),
    "parameter_of_real_tensor": lambda: module(weight=nn.Parameter(torch.linspace(0, 1, 5))),
    "parameter_with_gradient_off": lambda: module(weight=nn.Parameter(torch.ones(2), requires_grad=False)),
    "explicit_cpu": lambda: nn.Linear(2, 2, device="cpu", dtype=torch.float64),
    "buffer_of_parameter": lambda: (lambda p: module(weight=p, values=p.detach().clone()))(
        nn.Parameter(torch.ones(2))
    ),
    "no_grad": lambda: torch.no_grad()(lambda: Block())(),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_construction_is_exact(name: str, conforms: Callable[[Any], nn.Module]) -> None:
    conforms(BUILDERS[name])


def test_graph_of_a_tensor_computed_from_a_parameter_keeps_its_value(
    conforms: Callable[[Any], nn.Module],
) -> None:
    def build() -> nn.Module:
        made = module(weight=nn.Parameter(torch.ones(3)))
        made.doubled = made.weight * 2
        return made

    assert conforms(build).doubled.grad_fn is not None


def test_hooks_stay_on_parameters() -> None:
    from skipinit import skip_model_initialization

    calls: list[str] = []
    with skip_model_initialization():
        model = module(pending=nn.Parameter(torch.ones(2)), real=nn.Parameter(torch.linspace(0, 1, 2)))
        for parameter in (model.pending, model.real):
            parameter.register_hook(lambda grad: calls.append("hook"))
            parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    for parameter in (model.pending, model.real):
        assert parameter.is_meta
        parameter.sum().backward()
    assert calls == ["hook", "accumulated"] * 2


def test_module_level_cache_filled_during_construction_holds_values() -> None:
    from skipinit import skip_model_initialization

    cache: dict[int, Tensor] = {}

    def table(size: int) -> Tensor:
        return cache.setdefault(size, torch.zeros(size).add_(1))

    with skip_model_initialization():
        model = module(weight=nn.Parameter(table(3) * 2), size=table(3).size(0))
    assert cache[3].tolist() == [1, 1, 1]
    assert model.weight.is_meta


def test_random_buffers_hold_random_values_that_the_seed_decides() -> None:
    from skipinit import skip_model_initialization

    def build() -> nn.Module:
        with skip_model_initialization():
            return module(
                a=with_buffer(torch.randn(100)),
                b=with_buffer(torch.empty(100).normal_()),
                c=torch.bernoulli(torch.ones(9) / 2),
            )

    torch.manual_seed(3)
    first, again = build(), build()
    torch.manual_seed(4)
    other = build()
    assert torch.equal(first.a.buffer, again.a.buffer)
    assert torch.equal(first.b.buffer, again.b.buffer)
    assert not torch.equal(first.a.buffer, other.a.buffer)
    assert not torch.equal(first.a.buffer, first.b.buffer)
    assert 0.5 < float(first.a.buffer.std()) < 1.5


def test_values_read_later_have_the_default_dtype_of_their_time(conforms: Callable[[Any], nn.Module]) -> None:
    def build() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        thirds = [
            torch.ones(2, dtype=torch.int64) / 3,
            torch.ones(2, dtype=torch.bool) * 0.1,
            torch.ones(2) / 3,
        ]
        torch.set_default_dtype(before)
        return module(thirds=thirds)

    conforms(build)


def writes() -> nn.Module:
    """Calls that write to what they are given, and calls that only look at it in another way."""
    made = module(base=torch.zeros(4, 4), other=torch.ones(4, 4))
    torch.add(made.base, made.other, out=made.base)
    upper, lower = made.base.chunk(2)
    nn.init.eye_(upper)
    lower.copy_(upper)
    made.column = made.base.t()[0].unsqueeze(0)
    made.column.squeeze_()[1:] = 7
    made.flat = made.other.reshape(16).as_strided((2, 2), (4, 1), 1)
    made.other.masked_fill_(made.base > 0, 3)
    made.stacked = torch.stack([upper, lower]).sum(0)
    made.weight = nn.Parameter(torch.ones(3, 3).tril().t(), requires_grad=False)
    return made


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_writes_are_told_from_views(mode: Callable[[], Any], conforms: Callable[[Any], nn.Module]) -> None:
    with mode():
        assert conforms(writes).flat.shape == (2, 2)


def test_every_deepcopy_of_a_layer_with_buffers_skips_its_parameters(
    conforms: Callable[[Any], nn.Module],
) -> None:
    def build() -> nn.Module:
        layer = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
        return nn.ModuleList([layer, *(copy.deepcopy(layer) for _ in range(3))])

    conforms(build)


def test_channels_last_layers_skip_their_parameters(conforms: Callable[[Any], nn.Module]) -> None:
    conforms(lambda: nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last))


def test_conversions_give_what_they_give_plainly(conforms: Callable[[Any], nn.Module]) -> None:
    def build() -> nn.Module:
        tensor = torch.ones(2)
        same = tensor.to("cpu", torch.float32)
        copied = tensor.to("cpu", torch.float32, False, True)
        tensor.add_(1)
        like = tensor.to(torch.zeros(1, dtype=torch.float64))
        return module(
            all=[tensor, same, copied, like, torch.ones(1, 2, 2, 2).to(memory_format=torch.channels_last)]
        )

    conforms(build)


def test_autocast_chooses_dtypes_as_it_does_plainly(conforms: Callable[[Any], nn.Module]) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            ones = torch.full((2, 2), 1.01)
            before = ones @ ones  # computed later, when autocast is on
            with torch.autocast("cpu", dtype=torch.bfloat16):
                self.linear = nn.Linear(2, 2)
                self.register_buffer("pending", ones @ ones)
                self.register_buffer("real", torch.arange(4.0).view(2, 2) @ before)
                self.register_buffer("before", before)
                with torch.autocast("cpu", enabled=False):
                    self.register_buffer("inner", ones @ ones)

    conforms(Cast)


def test_conjugates_and_imaginary_parts(conforms: Callable[[Any], nn.Module]) -> None:
    def build() -> nn.Module:
        number = torch.ones(3, dtype=torch.complex64).mul_(1 + 2j)
        return module(conjugate=number.conj(), negative=number.conj().imag, imaginary=number.imag)

    conforms(build)


def test_tensors_whose_data_were_replaced_leave_no_trace(conforms: Callable[[Any], nn.Module]) -> None:
    """A new storage at the address of one that is gone is not taken for it."""

    def build() -> nn.Module:
        made = []
        for _ in range(50):
            replaced = torch.empty(3, 3)
            replaced.data = torch.arange(9.0).view(3, 3)
            made += [replaced, torch.ones(3, 3) * 2]
        return module(made=made)

    conforms(build)
