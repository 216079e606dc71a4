"""The comparison that every conformance test makes: plain construction against skipped, one seed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from skipinit import skip_model_initialization
from torch import Tensor, nn

Build = Callable[[], Any]


def tensors_within(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that plain Python attributes of *value* lead to, parameters and buffers apart."""
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        yield path, value
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        for name, entry in vars(value).items():
            if name not in ("_parameters", "_buffers"):
                yield from tensors_within(entry, f"{path}.{name}", seen)
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from tensors_within(entry, f"{path}[{key!r}]", seen)
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from tensors_within(entry, f"{path}[{index}]", seen)


def ties(named: dict[str, Tensor]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, tensor in named.items():
        groups.setdefault(id(tensor), set()).add(name)
    return {frozenset(group) for group in groups.values()}


def without_tensors(value: dict[str, Any]) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if not isinstance(entry, Tensor)}


def assert_same_tensor(name: str, mine: Tensor, plain: Tensor) -> None:
    assert type(mine) is type(plain), name
    assert mine.device == plain.device, name
    if isinstance(mine, nn.parameter.UninitializedTensorMixin):
        return
    assert (mine.dtype, mine.shape, mine.stride()) == (plain.dtype, plain.shape, plain.stride()), name
    assert mine.requires_grad == plain.requires_grad, name
    torch.testing.assert_close(mine, plain, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")


def assert_exact(mine: nn.Module, plain: nn.Module) -> None:
    """*mine* is *plain*, except that its parameters hold no storage."""
    assert [(n, type(m)) for n, m in mine.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert [m.training for m in mine.modules()] == [m.training for m in plain.modules()]
    mine_parameters = dict(mine.named_parameters(remove_duplicate=False))
    plain_parameters = dict(plain.named_parameters(remove_duplicate=False))
    assert list(mine_parameters) == list(plain_parameters)
    assert ties(mine_parameters) == ties(plain_parameters)
    for name, parameter in mine_parameters.items():
        expected = plain_parameters[name]
        assert type(parameter) is type(expected), name
        assert without_tensors(vars(parameter)) == without_tensors(vars(expected)), name
        assert parameter.requires_grad == expected.requires_grad, name
        if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
            assert parameter.device == expected.device
            continue
        assert parameter.is_meta, f"{name} holds storage"
        assert (parameter.dtype, parameter.shape) == (expected.dtype, expected.shape), name
        assert parameter.stride() == expected.stride(), name
    mine_buffers = dict(mine.named_buffers(remove_duplicate=False))
    plain_buffers = dict(plain.named_buffers(remove_duplicate=False))
    assert list(mine_buffers) == list(plain_buffers)
    assert ties(mine_buffers) == ties(plain_buffers)
    for name, buffer in mine_buffers.items():
        assert_same_tensor(name, buffer, plain_buffers[name])
    assert list(mine.state_dict()) == list(plain.state_dict())
    mine_attributes = dict(tensors_within(mine, "model", set()))
    plain_attributes = dict(tensors_within(plain, "model", set()))
    assert list(mine_attributes) == list(plain_attributes)
    for name, tensor in mine_attributes.items():
        if not (isinstance(tensor, nn.Parameter) and id(tensor) in {id(p) for p in mine_parameters.values()}):
            assert_same_tensor(name, tensor, plain_attributes[name])


@pytest.fixture
def conforms() -> Callable[[Build], nn.Module]:
    """Build plainly and skipped under one seed, and compare."""

    def check(build: Build) -> nn.Module:
        torch.manual_seed(0)
        plain = build()
        torch.manual_seed(0)
        before = torch.get_rng_state()
        with skip_model_initialization():
            mine = build()
        assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
        assert_exact(mine, plain)
        return mine

    return check
