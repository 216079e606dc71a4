"""Random programs of tensor operations end with the same tensors, whether parameters are skipped or not."""

import random
from collections.abc import Callable

import pytest
import torch
from skipinit import skip_model_initialization
from torch import Tensor, nn

PROGRAMS = 20  # of each seed
FACTORIES: list[Callable[[], Tensor]] = [
    lambda: torch.zeros(4, 4),
    lambda: torch.ones(4, 4),
    lambda: torch.full((4, 4), 2.5),
    lambda: torch.ones(4, 4).double(),
    lambda: torch.ones(4, 4, dtype=torch.int64),
    lambda: torch.arange(16.0).view(4, 4),
]


class Program:
    """Makes tensors, changes them, and registers some; the same for the same *seed*."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.tensors = [self.choose.choice(FACTORIES)()]
        self.module = nn.Module()
        for number in range(self.choose.randint(4, 25)):
            step = self.choose.choice(STEPS)
            one, other = self.choose.choice(self.tensors), self.choose.choice(self.tensors)
            try:
                made = step(self, number, one, other)
            except (RuntimeError, TypeError) as error:  # the same one in both, or what follows will differ
                made = torch.full((4, 4), float(len(type(error).__name__)))
            if isinstance(made, tuple):
                self.tensors += made
            elif made is not None:
                self.tensors.append(made)


def parameter(program: Program, number: int, one: Tensor, other: Tensor) -> Tensor:
    made = nn.Parameter(one, requires_grad=False)
    if program.choose.random() < 0.7:
        setattr(program.module, f"p{number}", made)
    return made


def replace_data(program: Program, number: int, one: Tensor, other: Tensor) -> None:
    if isinstance(one, nn.Parameter):
        one.data = other.detach()


def change_half(program: Program, number: int, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    halves = one.detach().chunk(2)
    halves[0].add_(1)
    return halves


def change_row(program: Program, number: int, one: Tensor, other: Tensor) -> None:
    one[0] = program.choose.randint(0, 9)


def nothing(changed: Tensor) -> None:
    """Add no tensor to the program: one of it was changed."""


STEPS: list[Callable[[Program, int, Tensor, Tensor], Tensor | tuple[Tensor, ...] | None]] = [
    parameter,
    parameter,
    replace_data,
    change_half,
    change_row,
    lambda program, n, one, other: program.choose.choice(FACTORIES)(),
    lambda program, n, one, other: one * 2,
    lambda program, n, one, other: one / 3,
    lambda program, n, one, other: one + other,
    lambda program, n, one, other: one[program.choose.randint(0, 1) :],
    lambda program, n, one, other: one.t(),
    lambda program, n, one, other: one.to(program.choose.choice([torch.float16, torch.float64])),
    lambda program, n, one, other: torch.cat([one, other]),
    lambda program, n, one, other: float(one.sum()) * torch.ones(4, 4),
    lambda program, n, one, other: torch.zeros_like(one),
    lambda program, n, one, other: one.detach().clone(),
    lambda program, n, one, other: nothing(one.add_(1)),
    lambda program, n, one, other: nothing(one.copy_(other)),
    lambda program, n, one, other: nothing(nn.init.constant_(one, 3.0)),
    lambda program, n, one, other: nothing(one.data[0].zero_()),
    lambda program, n, one, other: program.module.register_buffer(f"b{n}", one.detach()),
]


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed: int) -> None:
    for number in range(PROGRAMS * seed, PROGRAMS * (seed + 1)):
        plain = Program(number)
        with skip_model_initialization():
            skipped = Program(number)
        parameters = {id(p) for p in skipped.module.parameters()}
        assert len(parameters) == len(list(plain.module.parameters())), number
        assert len(plain.tensors) == len(skipped.tensors), number
        for expected, found in zip(plain.tensors, skipped.tensors, strict=True):
            assert not found.is_meta or id(found) in parameters, number
            assert (found.dtype, found.stride()) == (expected.dtype, expected.stride()), number
            assert found.shape == expected.shape, number
            assert found.is_meta or torch.equal(found, expected), number
