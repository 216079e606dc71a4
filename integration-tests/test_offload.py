"""One call on real model classes, and a pipeline whose models share one memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffsynth_core_vram import offload
from safemap import DiskMap
from safetensors.torch import save_model
from torch import Tensor, nn

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny convolutions are slow with several threads on a busy machine
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def make_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def make_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )


def make_text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "text_encoder": make_text_encoder,
    "unet": make_unet,
    "vae": make_vae,
}
IDS = torch.arange(16).view(1, 16)


def plain(name: str) -> Any:
    torch.manual_seed(0)
    return MAKERS[name]().eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipeline")
    for name in MAKERS:
        save_model(plain(name), str(folder / f"{name}.safetensors"))
    return {name: folder / f"{name}.safetensors" for name in MAKERS}


def pipeline(models: dict[str, Any]) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        **models,
        tokenizer=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, embedding: Tensor) -> Tensor:
    return pipe(  # type: ignore[no-any-return]
        prompt_embeds=embedding,
        negative_prompt_embeds=torch.zeros_like(embedding),
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


@pytest.mark.parametrize("ram", ["1GB", "200kB"])
def test_a_pipeline_of_three_models_in_one_memory(checkpoints: dict[str, Path], ram: str) -> None:
    models = {name: plain(name) for name in MAKERS}
    expected_embedding = models["text_encoder"](IDS).last_hidden_state
    expected = image(pipeline(models), expected_embedding)

    handles = {name: offload(MAKERS[name], checkpoints[name], device="cpu", ram=ram) for name in MAKERS}
    pipe = pipeline({name: handle.model for name, handle in handles.items()})
    assert pipe.device == torch.device("cpu")
    embedding = handles["text_encoder"](IDS).last_hidden_state
    assert torch.equal(embedding, expected_embedding)
    handles["text_encoder"].offload()  # its turn is over
    assert torch.equal(image(pipe, embedding), expected)
    for name, handle in handles.items():
        back = handle.remove()
        assert type(back) is type(models[name])
        assert all(
            torch.equal(a, b)
            for a, b in zip(back.state_dict().values(), models[name].state_dict().values(), strict=True)
        )


def test_a_model_that_is_built_already(checkpoints: dict[str, Path]) -> None:
    handle = offload(make_unet(), checkpoints["unet"], device="cpu", ram="100kB")
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = plain("unet")(sample, 3, states).sample
    assert torch.equal(handle(sample, 3, states).sample, expected)


INPUTS: dict[str, Any] = {
    "text_encoder": {"input_ids": IDS},
    "unet": [torch.ones(1, 4, 8, 8), 3, torch.ones(1, 16, 16)],
    "vae": {"sample": torch.ones(1, 3, 8, 8)},
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_forward_on_inputs_is_foreseen(name: str, checkpoints: dict[str, Path]) -> None:
    inputs = INPUTS[name]
    handle = offload(MAKERS[name], checkpoints[name], device="cpu", ram="200kB", inputs=inputs)
    given: tuple[Any, ...] = (inputs, {}) if isinstance(inputs, list) else ((), inputs)
    output, expected = handle(*given[0], **given[1]), plain(name)(*given[0], **given[1])
    assert torch.equal(output[0], expected[0])
    told = handle.report()
    prediction = told.plan.predict()
    assert told.plan.work is not None
    assert prediction is not None
    assert told.forward_s is not None
    assert prediction.compute_s > 0
    assert told.plan.work.activations_nbytes > 0
    called = {layer.name for layer in told.report.layers if layer.hits + layer.waits + layer.misses}
    assert called or name != "unet"
    assert called <= {name for name, seconds in told.plan.work.layer_s.items() if seconds}


def test_the_plan_of_a_checkpoint_is_that_of_the_model(checkpoints: dict[str, Path]) -> None:
    from offload_layers import Rates, plan

    rates = Rates(disk_bytes_per_s=2e9, bus_bytes_per_s=1e10, memory_bytes_per_s=1e10, flops=1e12)
    source = DiskMap(checkpoints["unet"])
    of_file = plan(checkpoints["unet"], device="cpu", ram="150kB", rates=rates)
    of_map = plan(source, device="cpu", ram="150kB", rates=rates)
    of_model = plan(make_unet(), device="cpu", ram="150kB", rates=rates, source=source)
    assert of_file.to_dict()["nbytes"] == of_map.to_dict()["nbytes"]
    total = sum(of_file.to_dict()["nbytes"].values())
    assert sum(of_model.to_dict()["nbytes"].values()) == total == sum(source.sizes().values())
