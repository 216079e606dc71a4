"""Real model classes with their own module maps: managed or not, they compute what the plain model does."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from configurations import CONFIGURATIONS, FP8, limit_of
from diffsynth_core_vram import AutoWrappedNonRecurseModule
from studio_case import Case
from studio_cases import CASES
from torch import nn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


def managed_parameters(model: nn.Module, module_map: Mapping[type[nn.Module], Any]) -> Iterator[nn.Parameter]:
    """The parameters that a module map is about: the first entry counts, what it covers is not entered."""
    for source, target in module_map.items():
        if isinstance(model, source):
            recurse = target is not AutoWrappedNonRecurseModule
            yield from model.parameters(recurse=recurse)
            if recurse:
                return
            break
    for child in model.children():
        yield from managed_parameters(child, module_map)


def rounded(model: nn.Module, module_map: Mapping[type[nn.Module], Any]) -> nn.Module:
    """Return *model* with the weights that eight bits leave of it."""
    model = copy.deepcopy(model)
    for parameter in managed_parameters(model, module_map):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(FP8).to(parameter.dtype)
    return model


def onload(model: nn.Module, method: str = "onload") -> None:
    for module in [model] if hasattr(model, method) else list(model.modules()):
        if hasattr(module, method):
            getattr(module, method)()


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_computes_what_the_plain_model_computes(case: Case, configuration: str, pool, saved) -> None:
    plain = case.build()
    path = saved(plain)
    nbytes = sum(p.nbytes for p in plain.parameters())
    vram_config = CONFIGURATIONS[configuration](case.dtype)
    with case.small():
        model = pool.load_model_file(
            {"model_class": case.model_class, "extra_kwargs": dict(case.config)},
            path,
            vram_config,
            vram_limit=limit_of(configuration, nbytes),
        )
    assert getattr(model, "vram_management_enabled", False) == (configuration != "none")
    if configuration == "fp8 storage":
        expected = case.run(rounded(plain, pool.fetch_module_map(case.model_class, vram_config)))
    else:
        expected = case.run(plain)

    assert torch.equal(case.run(model), expected)  # without onload()
    for _ in range(2):  # as load_models_to_device does between uses
        onload(model)
        assert torch.equal(case.run(model), expected)
        assert torch.equal(case.run(model), expected)
        onload(model, "offload")
    assert torch.equal(case.run(model), expected)
