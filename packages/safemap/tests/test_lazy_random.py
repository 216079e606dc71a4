"""Random programs of tensor operations: run lazily and evaluated by name, they give what they give eagerly.

The oracle is torch itself: the same program on the same tensors in memory.
"""

import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safemap import DiskMap
from safemap._write import write_safetensors
from torch import Tensor

_SHAPES = [(4, 6), (6, 4), (2, 3, 4), (12,), (1, 6), (4, 1, 6), ()]
_DTYPES = [torch.float32, torch.bfloat16, torch.int32, torch.float64]


def _stored() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"t{i}": (torch.rand(shape, generator=generator) * 9).to(_DTYPES[i % 4])
        for i, shape in enumerate(_SHAPES * 2)
    }


class _Program:
    """A converter made of random choices; it makes the same ones each time it is called.

    A step that torch refuses is skipped, on both sides.
    """

    def __init__(self, choices: list[int]) -> None:
        self.choices = choices

    def __call__(self, state_dict: dict[str, Tensor]) -> dict[str, Any]:
        choices = iter(self.choices)
        stored = {name: state_dict[name] for name in sorted(state_dict)}
        live = list(stored.values())
        for operation in choices:
            taken = [next(choices, 0) for _ in range(4)]
            first, second = live[taken[0] % len(live)], live[taken[1] % len(live)]
            step = _STEPS[operation % len(_STEPS)]
            try:
                made = step(first, second, taken[2], taken[3])
            except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError):
                continue
            live += [made] if isinstance(made, Tensor) else list(made)
        return {**stored, **{f"live.{i}": tensor for i, tensor in enumerate(live)}}


def _write_part(a: Tensor, b: Tensor, i: int, j: int) -> Tensor:
    a[i % a.shape[0]] = b.clone()
    return a


def _write_rows(a: Tensor, b: Tensor, i: int, j: int) -> Tensor:
    start = i % a.shape[0]
    a[start : start + 2] = b[:2].clone()
    return a


def _new(a: Tensor, b: Tensor, i: int, j: int) -> Tensor:
    new = torch.empty((i % 3 + 1, *a.shape), dtype=a.dtype)
    new.zero_() if j % 2 else new.fill_(j)
    new[0] = a
    return new


_STEPS = [
    lambda a, b, i, j: a.t(),
    lambda a, b, i, j: a.transpose(i % a.dim(), j % a.dim()),
    lambda a, b, i, j: a.permute(*sorted(range(a.dim()), key=lambda axis: (i >> axis) % 4)),
    lambda a, b, i, j: a.reshape(-1),
    lambda a, b, i, j: a.reshape([(2, -1), (-1, 3), (-1, 4, 1), (2, 2, -1)][i % 4]),
    lambda a, b, i, j: a.view(2, -1),
    lambda a, b, i, j: a.chunk(i % 4 + 1, dim=j % a.dim()),
    lambda a, b, i, j: a.split(i % 3 + 1, dim=j % a.dim()),
    lambda a, b, i, j: a.unbind(i % a.dim()),
    lambda a, b, i, j: a[i % 5 :],
    lambda a, b, i, j: a[..., : i % 5 + 1],
    lambda a, b, i, j: a[:: i % 3 + 1],
    lambda a, b, i, j: a[i % a.shape[0]],
    lambda a, b, i, j: a[None],
    lambda a, b, i, j: a.squeeze(),
    lambda a, b, i, j: a.detach().t_(),
    lambda a, b, i, j: a.detach().unsqueeze_(0),
    lambda a, b, i, j: a.narrow(i % a.dim(), 0, 1),
    lambda a, b, i, j: a.expand(3, *a.shape),
    lambda a, b, i, j: a.unfold(0, 2, i % 3 + 1),
    lambda a, b, i, j: a.diagonal(),
    lambda a, b, i, j: torch.cat([a, b], dim=i % a.dim()),
    lambda a, b, i, j: torch.cat([a, a, b[:0]], dim=i % a.dim()),
    lambda a, b, i, j: torch.stack([a, b], dim=i % (a.dim() + 1)),
    lambda a, b, i, j: torch.stack([a, a.clone()], dim=i % (a.dim() + 1)),
    lambda a, b, i, j: a.clone(),
    lambda a, b, i, j: a.contiguous(),
    lambda a, b, i, j: a.clone(memory_format=torch.contiguous_format),
    lambda a, b, i, j: a.to(_DTYPES[i % 4]),
    lambda a, b, i, j: a.float(),
    lambda a, b, i, j: a + 1,
    lambda a, b, i, j: a * b,
    lambda a, b, i, j: a - a.flip(0),
    lambda a, b, i, j: a.roll(i % 3, 0),
    lambda a, b, i, j: a @ b.to(a.dtype),  # of different dtypes only the real operator refuses
    lambda a, b, i, j: a.sort(dim=-1),
    lambda a, b, i, j: torch.where(a > 3, a, torch.zeros_like(a)),
    lambda a, b, i, j: a[a > 3],
    lambda a, b, i, j: a[torch.tensor([0, -1])] if a.numel() else a,
    lambda a, b, i, j: a if a.sum() > 40 else a + 2,
    lambda a, b, i, j: a.view(torch.uint8),
    lambda a, b, i, j: torch.zeros(i % 3 + 1, j % 4, dtype=a.dtype),
    lambda a, b, i, j: torch.full_like(a, i % 200),
    lambda a, b, i, j: a.new_zeros(i % 4, 6),
    lambda a, b, i, j: torch.nn.Parameter(a, requires_grad=False),
    lambda a, b, i, j: a.mul_(2),
    lambda a, b, i, j: a.add_(b.to(a.dtype, copy=True)),
    lambda a, b, i, j: a.zero_(),
    lambda a, b, i, j: a.fill_(i),
    lambda a, b, i, j: a.copy_(b.clone()),
    lambda a, b, i, j: a.clamp_(1, 5),
    _write_part,
    _write_part,
    _write_rows,
    _new,
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    tensors = _stored()
    path = str(tmp_path_factory.mktemp("programs") / "model.safetensors")
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(path, described, tensors.__getitem__, {})
    return path


def _check(found: Tensor, expected: Tensor, name: str) -> None:
    assert type(found) is Tensor
    assert found.dtype == expected.dtype, name
    assert torch.equal(found, expected.detach()) or _both_nan(found, expected), name


def _both_nan(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape and a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    )


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(choices=st.lists(st.integers(0, 1 << 12), min_size=5, max_size=90), through_pickle=st.booleans())
def test_a_program_gives_what_it_gives_eagerly(choices: list[int], through_pickle: bool, file: str) -> None:
    program = _Program(choices)
    eager = program(_stored())
    with DiskMap(file, state_dict_converter=program) as opened:
        lazy = pickle.loads(pickle.dumps(opened)) if through_pickle else opened
        assert list(lazy) == list(eager)
        for name, expected in eager.items():
            _check(lazy[name], expected, name)
            assert lazy.info(name).shape == expected.shape
            assert lazy.info(name).dtype == expected.dtype
            out = torch.full(expected.shape, 77, dtype=expected.dtype)
            _check(lazy.read_into(name, out), expected, name)
            if expected.dim():
                _check(lazy.slice(name)[1:3], expected[1:3], name)
            if expected.dim() > 1:
                _check(lazy.slice(name)[..., 1:2], expected[..., 1:2], name)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(choices=st.lists(st.integers(0, 1 << 12), min_size=5, max_size=60))
def test_together_they_share_memory_as_eagerly(choices: list[int], file: str) -> None:
    """Add one to each in turn: whoever shares memory with it changes too, and nobody else."""
    program = _Program(choices)
    eager = program(_stored())
    with DiskMap(file, state_dict_converter=program) as opened:
        lazy = opened.tensors()
    for name, expected in eager.items():
        try:
            expected.detach().add_(1)
        except RuntimeError:  # its elements overlap themselves
            continue
        lazy[name].add_(1)
    for name, expected in eager.items():
        _check(lazy[name], expected, name)
