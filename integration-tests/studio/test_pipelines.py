"""Whole pipelines, loaded by DiffSynth-Studio itself: the pictures are those of plain models, bit for bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import CONFIGURATIONS
from diffsynth_core_vram import AutoTorchModule
from offload_layers import State
from small_pipelines import PIPELINES, SmallPipeline
from torch import Tensor, nn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

MANAGED = [name for name in CONFIGURATIONS if name not in ("none", "fp8 storage")]

Load = Callable[..., Any]


@pytest.fixture(params=PIPELINES.values(), ids=PIPELINES.keys())
def small(request: pytest.FixtureRequest) -> SmallPipeline:
    """Each pipeline in turn."""
    found: SmallPipeline = request.param
    return found


@pytest.fixture
def load(small: SmallPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load the pipeline in a configuration; DiffSynth-Studio recognises its files."""
    from diffsynth.models import model_loader

    known: list[Any] = []
    monkeypatch.setattr(model_loader, "MODEL_CONFIGS", known)

    def start(configuration: str) -> Any:
        limit = {"disk": 0.0, "dynamic limit": 1e-4}.get(configuration)
        return small.load(configuration, tmp_path, known, limit)

    return start


@contextmanager
def low_rank(model: nn.Module, lora: dict[str, Tensor], alpha: float = 1.0) -> Iterator[None]:
    """Add low-rank changes to the outputs of plain linear layers: what hot loading promises."""

    def add(a: Tensor, b: Tensor) -> Any:
        return lambda module, inputs, out: out + inputs[0] @ a.T @ b.T

    hooks = []
    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" in lora:
            a, b = lora[f"{name}.lora_A.weight"] * alpha, lora[f"{name}.lora_B.weight"]
            hooks.append(module.register_forward_hook(add(a, b)))
    assert hooks
    yield
    for hook in hooks:
        hook.remove()


def denoiser(small: SmallPipeline, pipe: Any) -> Any:
    return getattr(pipe, small.denoiser)


@pytest.mark.parametrize("configuration", [name for name in CONFIGURATIONS if name != "fp8 storage"])
def test_the_picture_is_the_same(small: SmallPipeline, load: Load, configuration: str) -> None:
    pipe = load(configuration)
    assert pipe.vram_management_enabled == (configuration != "none")
    expected = small.run(small.plain())
    assert torch.equal(small.run(pipe), expected)
    assert torch.equal(small.run(pipe), expected)


def test_with_weights_of_eight_bits_the_picture_is_close(small: SmallPipeline, load: Load) -> None:
    picture, expected = small.run(load("fp8 storage")).float(), small.run(small.plain()).float()
    assert not torch.equal(picture, expected)
    # three bits of mantissa: each weight is off by up to 6 %, at random, in every layer
    assert (picture - expected).norm() < 0.5 * expected.norm()


@pytest.mark.parametrize("configuration", MANAGED)
def test_low_rank_changes_are_loaded_and_cleared(
    small: SmallPipeline, load: Load, configuration: str
) -> None:
    plain, pipe, lora = small.plain(), load(configuration), small.lora(1)
    before = small.run(plain)
    with low_rank(denoiser(small, plain), lora, 0.5):
        expected = small.run(plain)
        pipe.load_lora(denoiser(small, pipe), state_dict=lora, alpha=0.5, verbose=0)
        assert torch.equal(small.run(pipe), expected)
        with low_rank(denoiser(small, plain), small.lora(2)):
            pipe.load_lora(denoiser(small, pipe), state_dict=small.lora(2), verbose=0)
            assert torch.equal(small.run(pipe), small.run(plain))
    pipe.clear_lora(verbose=0)
    assert not torch.equal(before, expected)
    assert torch.equal(small.run(pipe), before)


@pytest.mark.parametrize("configuration", ["none", *MANAGED])
def test_low_rank_changes_are_fused(
    small: SmallPipeline, load: Load, configuration: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, pipe, lora = small.plain(), load(configuration), small.lora(1)
    before = small.run(plain)
    for each in (plain, pipe):
        each.load_lora(denoiser(small, each), state_dict=lora, alpha=0.5, hotload=False)
    fused = f"{len(lora) // 2} tensors are fused by LoRA."
    assert capsys.readouterr().out.count(fused) == 2
    expected = small.run(plain)
    assert not torch.equal(before, expected)
    assert torch.equal(small.run(pipe), expected)
    assert torch.equal(small.run(pipe), expected)  # after it has been offloaded


def test_hot_loading_can_be_enabled_for_a_plain_model(small: SmallPipeline, load: Load) -> None:
    plain, pipe, lora = small.plain(), load("none"), small.lora(1)
    model = denoiser(small, pipe)
    assert pipe.enable_lora_hot_loading(model) is model
    assert pipe.enable_lora_hot_loading(model) is model
    before = small.run(plain)
    assert torch.equal(small.run(pipe), before)
    pipe.load_lora(model, state_dict=lora, verbose=0)
    with low_rank(denoiser(small, plain), lora):
        assert torch.equal(small.run(pipe), small.run(plain))
    pipe.clear_lora(verbose=0)
    assert torch.equal(small.run(pipe), before)


@pytest.mark.parametrize("configuration", MANAGED)
@pytest.mark.parametrize("small", [PIPELINES["z-image"]], ids=["z-image"], indirect=True)
def test_a_prompt_brings_its_own_low_rank_change(
    small: SmallPipeline, load: Load, configuration: str
) -> None:
    positive, negative = small.lora(1), small.lora(2)
    plain, pipe = small.plain(), load(configuration)
    before = small.run(plain)
    own = plain.model_fn
    sides: list[dict[str, Tensor]] = []

    def with_lora(*args: Any, **kwargs: Any) -> Any:  # the two sides of a step come one after the other
        sides.append(negative if len(sides) % 2 else positive)
        with low_rank(plain.dit, sides[-1]):
            return own(*args, **kwargs)

    plain.model_fn = with_lora
    expected = small.run(plain)
    assert len(sides) == 4
    assert not torch.equal(before, expected)
    assert torch.equal(small.run(pipe, positive_only_lora=positive, negative_lora=negative), expected)
    assert torch.equal(small.run(pipe), before)


def test_models_take_turns(small: SmallPipeline, load: Load) -> None:
    pipe = load("disk, memory")
    seen: dict[str, set[State]] = {}
    own = pipe.model_fn

    def states(model: nn.Module) -> set[State]:
        return {module.state for module in model.modules() if isinstance(module, AutoTorchModule)}

    def looking(*args: Any, **kwargs: Any) -> Any:
        seen.update({name: states(getattr(pipe, name)) for name in small.components})
        return own(*args, **kwargs)

    pipe.model_fn = looking
    small.run(pipe)
    assert State.OFFLOAD not in seen.pop(small.denoiser)
    assert all(found == {State.OFFLOAD} for found in seen.values())
    assert all(states(getattr(pipe, name)) == {State.OFFLOAD} for name in small.components)
    assert all(
        parameter.device.type == "meta"
        for name in small.components
        for module in getattr(pipe, name).modules()
        if isinstance(module, AutoTorchModule)
        for parameter in module._parameters.values()
        if parameter is not None
    )
