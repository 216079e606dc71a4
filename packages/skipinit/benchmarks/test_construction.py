"""Construction of a stack of layers, with nothing installed but this package; ``pytest --benchmark-only``."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from skipinit import skip_model_initialization
from torch import nn

WAYS: dict[str, Any] = {
    "skipinit": skip_model_initialization,
    "meta-device": lambda: torch.device("meta"),
    "plain": nullcontext,
}


@pytest.mark.benchmark(group="100 layers of 256 x 256")
@pytest.mark.parametrize("way", WAYS)
def test_layers(benchmark: BenchmarkFixture, way: str) -> None:
    def build() -> nn.Module:
        with WAYS[way]():
            return nn.Sequential(*(nn.Linear(256, 256) for _ in range(100)))

    assert len(list(benchmark(build).parameters())) == 200


@pytest.mark.benchmark(group="parameter of scaled random numbers, 2048 x 2048")
@pytest.mark.parametrize("way", ["skipinit", "plain"])
def test_random_parameter(benchmark: BenchmarkFixture, way: str) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        with WAYS[way]():
            model.weight = nn.Parameter(torch.randn(2048, 2048) / 2048**0.5)
        return model

    assert benchmark(build).weight.shape == (2048, 2048)


@pytest.mark.benchmark(group="entering and leaving an empty block")
def test_empty_block(benchmark: BenchmarkFixture) -> None:
    def enter() -> None:
        with skip_model_initialization():
            pass

    benchmark(enter)
