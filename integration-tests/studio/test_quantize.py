"""DiffSynth-Studio's own quantization, with the backends that compute on a CPU, in managed models."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import CONFIGURATIONS, limit_of
from offload_layers import AutoWrappedQuantizedModule
from safetensors.torch import save_file
from studio_case import Case
from studio_cases import CASES
from test_models import onload
from torch import Tensor, nn

pytest.importorskip("bitsandbytes", reason="nox -s diffsynth installs it")
pytest.importorskip("torchao", reason="nox -s diffsynth installs it")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

METHODS = [
    "bitsandbytes_nf4",
    "bitsandbytes_fp4",
    "torchao_int8_w8a16",
    "torchao_fp8_w8a16",
    "torchao_int8_w8a8",
    "torchao_nvfp4_w4a16",
]


def _call(model: Any, draw: Any) -> Tensor:
    return model(draw(1, 4, 2, 8, 8), torch.tensor([500.0]), draw(1, 6, 64))


#: widths that every method can pack
CASE = dataclasses.replace(
    CASES["lingbot-video"],
    call=_call,
    config={
        **CASES["lingbot-video"].config, "hidden_size": 64, "text_dim": 64, "intermediate_size": 64,
        "freq_dim": 64, "axes_dims": (8, 12, 12), "num_experts": 0, "in_channels": 4, "out_channels": 4,
    },
)  # fmt: skip


def quantization(method: str, **options: Any) -> Any:
    from diffsynth.core.quant import QuantizeConfig

    excluded = ["patch_embedder", "proj_out"]  # too narrow for some methods
    return QuantizeConfig(method=method, exclude_modules=excluded, **options)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Each method that computes on a CPU."""
    found: str = request.param
    return found


@pytest.fixture
def load(pool: Any) -> Callable[..., nn.Module]:
    """Load the case as a pipeline does."""

    def start(path: str, configuration: str, quantize: Any) -> nn.Module:
        config = {"model_class": CASE.model_class, "extra_kwargs": dict(CASE.config)}
        vram_config = CONFIGURATIONS[configuration](CASE.dtype)
        return pool.load_model_file(
            config, path, vram_config, vram_limit=limit_of(configuration, 0), quantize=quantize
        )

    return start


def quantized(case: Case, method: str, **options: Any) -> nn.Module:
    """The plain model, quantized by DiffSynth-Studio alone."""
    quantize = quantization(method, **options)
    model: nn.Module = quantize.quantize_model(case.build(), compute_device="cpu", model_device="cpu")
    return model.eval()  # some layers compute in another way while they train


def check(model: nn.Module, expected: Tensor) -> None:
    assert torch.equal(CASE.run(model), expected)
    onload(model)
    assert torch.equal(CASE.run(model), expected)
    assert torch.equal(CASE.run(model), expected)
    onload(model, "offload")
    assert torch.equal(CASE.run(model), expected)


@pytest.mark.parametrize("configuration", ["none", "cpu offload"])
def test_a_plain_checkpoint_is_quantized(
    method: str, configuration: str, load: Callable[..., nn.Module], saved: Any
) -> None:
    expected = CASE.run(quantized(CASE, method))
    assert not torch.equal(expected, CASE.run(CASE.build()))
    quantize = quantization(method)
    model = load(saved(CASE.build()), configuration, quantize)
    assert model.quantize_config is quantize
    layers = [m for m in model.modules() if isinstance(m, AutoWrappedQuantizedModule)]
    assert bool(layers) == (configuration != "none")
    check(model, expected)


@pytest.mark.parametrize("configuration", ["none", "cpu offload", "disk, memory", "disk", "disk, preparing"])
def test_a_quantized_checkpoint_is_loaded(
    method: str, configuration: str, load: Callable[..., nn.Module], tmp_path: Path
) -> None:
    tensors, metadata = quantization(method).flatten_state_dict(quantized(CASE, method).state_dict())
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    expected = CASE.run(quantized(CASE, method))
    quantize = quantization(method, load_prequantized=True)
    check(load(str(tmp_path / "model.safetensors"), configuration, quantize), expected)


def test_a_plain_checkpoint_cannot_be_quantized_on_disk(load: Callable[..., nn.Module], saved: Any) -> None:
    with pytest.raises(ValueError, match="load_prequantized=True"):
        load(saved(CASE.build()), "disk", quantization(METHODS[0]))


@pytest.mark.parametrize("configuration", ["none", "cpu offload"])
def test_weights_may_be_restored_once(
    method: str, configuration: str, load: Callable[..., nn.Module], saved: Any
) -> None:
    quantize = quantization(method, mode="dequant_once")
    restored = quantize.dequantize_model(quantized(CASE, method), compute_dtype=CASE.dtype)
    check(load(saved(CASE.build()), configuration, quantize), CASE.run(restored))


@pytest.mark.parametrize("configuration", ["none", "cpu offload"])
def test_low_rank_changes_are_hot_loaded_into_quantized_layers(
    method: str, configuration: str, load: Callable[..., nn.Module], saved: Any
) -> None:
    from diffsynth.diffusion.base_pipeline import BasePipeline

    name = "blocks.0.attn.to_v"
    reference = quantized(CASE, method)
    layer = reference.get_submodule(name)
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(2, layer.in_features, generator=generator).bfloat16()
    b = torch.randn(layer.out_features, 2, generator=generator).bfloat16()
    before = CASE.run(reference)
    layer.register_forward_hook(lambda module, inputs, out: out + inputs[0] @ a.T @ b.T)
    expected = CASE.run(reference)
    assert not torch.equal(before, expected)

    pipe = BasePipeline(device="cpu", torch_dtype=torch.bfloat16)
    pipe.dit = load(saved(CASE.build()), configuration, quantization(method))
    pipe.load_lora(pipe.dit, state_dict={f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, verbose=0)
    assert torch.equal(CASE.run(pipe.dit), expected)
    pipe.clear_lora(verbose=0)
    assert torch.equal(CASE.run(pipe.dit), before)
