"""skipinit on real model classes: construction is exact, and the loaded model computes the same bits."""

import functools
import importlib
import importlib.metadata
import sys
import types
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from skipinit import skip_model_initialization, unmaterialized
from torch import Tensor, nn


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, in_channels=4, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, in_channels=16,
        out_channels=4, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, text_dim=16, freq_dim=32, ffn_dim=64,
        in_channels=4, out_channels=4, cross_attn_norm=True,
    )  # fmt: skip


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4)


def clip_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=100, **size))


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": 100, **size},
            vision_config={"image_size": 32, "patch_size": 16, **size},
        )
    )


def t5_encoder() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))


def qwen2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    )


@functools.cache
def diffsynth_class(module: str, name: str) -> Any:
    """A model class of DiffSynth-Studio, without what its packages import: pipelines, torchvision ..."""
    try:
        root = Path(str(importlib.metadata.distribution("diffsynth").locate_file("diffsynth")))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("DiffSynth-Studio is not installed (nox -s diffsynth installs it)")
    with unittest.mock.patch.dict(sys.modules), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("diffsynth", "diffsynth.core", "diffsynth.models"):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        return getattr(importlib.import_module(f"diffsynth.models.{module}"), name)


def diffsynth_wan() -> nn.Module:
    model: nn.Module = diffsynth_class("wan_video_dit", "WanModel")(
        dim=96, in_dim=4, ffn_dim=64, out_dim=4, text_dim=16, freq_dim=32, eps=1e-6, patch_size=(1, 2, 2),
        num_heads=2, num_layers=2, has_image_input=False,
    )  # fmt: skip
    return model


def diffsynth_qwen_image() -> nn.Module:
    model: nn.Module = diffsynth_class("qwen_image_dit", "QwenImageDiT")(num_layers=1)
    return model


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    builder.__name__: builder
    for builder in (
        flux, qwen_image, wan, autoencoder, clip_text, clip, t5_encoder, qwen2_5_vl, bert, diffsynth_wan,
        diffsynth_qwen_image,
    )
}  # fmt: skip


def tensors_within(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that Python attributes of *value* lead to, registered parameters and buffers apart."""
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        yield path, value
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        entries = [(k, v) for k, v in vars(value).items() if k not in ("_parameters", "_buffers")]
    elif isinstance(value, dict):
        entries = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        entries = [(str(k), v) for k, v in enumerate(value)]
    else:
        return
    for name, entry in entries:
        yield from tensors_within(entry, f"{path}.{name}", seen)


def same_bits(mine: Tensor, plain: Tensor) -> bool:
    return (mine.device, mine.dtype, mine.stride()) == (
        plain.device,
        plain.dtype,
        plain.stride(),
    ) and torch.equal(mine, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_construction_is_exact(name: str) -> None:
    build = BUILDERS[name]
    torch.manual_seed(0)
    plain = build()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with skip_model_initialization():
        model = build()
    assert torch.equal(torch.get_rng_state(), before)

    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    parameters, expected = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, plain))
    assert list(parameters) == list(expected)
    assert unmaterialized(model) == list(parameters)
    for key, parameter in parameters.items():
        other = expected[key]
        assert type(parameter) is type(other), key
        assert (parameter.shape, parameter.dtype, parameter.stride()) == (
            other.shape,
            other.dtype,
            other.stride(),
        ), key
        assert parameter.requires_grad == other.requires_grad, key
        assert vars(parameter).keys() == vars(other).keys(), key
    ties = [{frozenset(k for k in d if d[k] is d[key]) for key in d} for d in (parameters, expected)]
    assert ties[0] == ties[1]

    buffers, expected_buffers = (dict(m.named_buffers(remove_duplicate=False)) for m in (model, plain))
    assert list(buffers) == list(expected_buffers)
    assert all(same_bits(buffers[key], expected_buffers[key]) for key in buffers)
    attributes, expected_attributes = (dict(tensors_within(m, "", set())) for m in (model, plain))
    assert list(attributes) == list(expected_attributes)
    assert all(same_bits(attributes[key], expected_attributes[key]) for key in attributes)
    assert list(model.state_dict()) == list(plain.state_dict())


def inputs_of(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.arange(6).view(1, 6)
    latent = {"generator": generator}
    return {
        "flux": lambda: {
            "hidden_states": torch.randn(1, 4, 4, **latent),
            "encoder_hidden_states": torch.randn(1, 3, 16, **latent),
            "pooled_projections": torch.randn(1, 16, **latent),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(3, 3),
        },
        "qwen_image": lambda: {
            "hidden_states": torch.randn(1, 4, 16, **latent),
            "encoder_hidden_states": torch.randn(1, 3, 16, **latent),
            "encoder_hidden_states_mask": torch.ones(1, 3, dtype=torch.bool),
            "timestep": torch.tensor([0.5]),
            "img_shapes": [[(1, 2, 2)]],
        },
        "wan": lambda: {
            "hidden_states": torch.randn(1, 4, 1, 4, 4, **latent),
            "encoder_hidden_states": torch.randn(1, 3, 16, **latent),
            "timestep": torch.tensor([5]),
        },
        "clip_text": lambda: {"input_ids": tokens},
        "t5_encoder": lambda: {"input_ids": tokens},
        "qwen2_5_vl": lambda: {"input_ids": tokens},
        "bert": lambda: {"input_ids": tokens},
    }[name]()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["flux", "qwen_image", "wan", "clip_text", "t5_encoder", "qwen2_5_vl", "bert"]
)
def test_loaded_model_computes_the_same_bits(name: str) -> None:
    plain = BUILDERS[name]().eval()
    with skip_model_initialization():
        model = BUILDERS[name]()
    state = plain.state_dict()
    model.eval().load_state_dict(state, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # load_state_dict(assign=True) breaks ties
    assert unmaterialized(model) == []
    with torch.no_grad():
        mine, expected = model(**inputs_of(name)), plain(**inputs_of(name))
    assert mine.keys() == expected.keys()
    assert torch.equal(mine[0], expected[0])
