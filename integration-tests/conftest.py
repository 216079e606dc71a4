"""Real model classes with small configurations: how to build, to call and to save them."""

import os

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before diffusers and transformers are imported: nothing here may download
)

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffsynth_core_vram import AutoWrappedLinear, AutoWrappedModule, AutoWrappedNonRecurseModule
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from safetensors.torch import save_file
from torch import Tensor, nn

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A model class, and one call of it. ``inputs`` draws from the global generator, in the model's dtype."""

    model_class: type[nn.Module]
    config: Mapping[str, Any]
    inputs: Callable[[torch.dtype], Inputs]
    dtype: torch.dtype = torch.bfloat16  # in which pipelines run this class
    as_one_layer: tuple[type[nn.Module], ...] = ()  # parts whose code asks for the dtype of their parameters

    def build(self) -> nn.Module:
        """Build the plain model in ``dtype``, with the same random weights every time."""
        torch.manual_seed(0)
        model = self.model_class(**self.config)
        for parameter in model.parameters():  # norms and zero-initialised layers would hide mistakes
            nn.init.normal_(parameter, std=0.05)
        return with_dtype(model, self.dtype)

    def call(self, model: nn.Module, device: torch.device) -> Tensor:
        """Run *model* once; return everything that it computed, as one vector."""
        torch.manual_seed(1)
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs(self.dtype).items()}
        with torch.no_grad():
            out = model(**inputs, return_dict=False)
        first = out[0]
        assert isinstance(first, Tensor)
        assert first.isfinite().all()
        assert first.float().std() > 1e-3, "an output without information proves nothing"
        return first


def with_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating-point parameters of *model*; buffers keep the dtype in which they were made."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _tokens(vocabulary: int, length: int = 12) -> Tensor:
    return torch.randint(3, vocabulary, (2, length))


def _qwen_image(dtype: torch.dtype) -> Inputs:
    return {
        "hidden_states": torch.randn(1, 24, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 7, 24, dtype=dtype),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.long),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_shapes": [[(1, 4, 6)]],
    }


def _flux(dtype: torch.dtype) -> Inputs:
    return {
        "hidden_states": torch.randn(1, 16, 8, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 6, 32, dtype=dtype),
        "pooled_projections": torch.randn(1, 24, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.randint(0, 4, (16, 3)).to(dtype),
        "txt_ids": torch.zeros(6, 3, dtype=dtype),
    }


def _wan(dtype: torch.dtype) -> Inputs:
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 9, 24, dtype=dtype),
    }


def _sd3(dtype: torch.dtype) -> Inputs:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 6, 24, dtype=dtype),
        "pooled_projections": torch.randn(1, 20, dtype=dtype),
        "timestep": torch.tensor([500.0], dtype=dtype),
    }


def _unet(dtype: torch.dtype) -> Inputs:
    return {
        "sample": torch.randn(1, 4, 8, 8, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16, dtype=dtype),
    }


CASES = {
    "qwen-image": Case(
        diffusers.QwenImageTransformer2DModel,
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "axes_dims_rope": (8, 4, 4),
        },
        _qwen_image,
    ),
    "flux": Case(
        diffusers.FluxTransformer2DModel,
        {
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 24,
            "axes_dims_rope": (8, 4, 4),
        },
        _flux,
    ),
    "wan": Case(  # parameters in containers: scale_shift_table in the model and in each block
        diffusers.WanTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 24,
            "freq_dim": 16,
            "ffn_dim": 48,
            "num_layers": 2,
        },
        _wan,
        torch.float32,
        as_one_layer=(WanTimeTextImageEmbedding,),
    ),
    "sd3": Case(  # a persistent buffer: pos_embed.pos_embed
        diffusers.SD3Transformer2DModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 20,
            "pos_embed_max_size": 8,
        },
        _sd3,
    ),
    "unet": Case(
        diffusers.UNet2DConditionModel,
        {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
        },
        _unet,
        torch.float32,
    ),
    "vae": Case(
        diffusers.AutoencoderKL,
        {
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
        },
        lambda dtype: {"sample": torch.randn(1, 3, 16, 16, dtype=dtype)},
        torch.float32,
    ),
    "t5": Case(  # tied: shared.weight and encoder.embed_tokens.weight
        transformers.T5EncoderModel,
        {
            "config": transformers.T5Config(
                vocab_size=64,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        },
        lambda dtype: {"input_ids": _tokens(64)},
    ),
    "clip": Case(
        transformers.CLIPTextModel,
        {
            "config": transformers.CLIPTextConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=16,
                bos_token_id=1,
                eos_token_id=2,
            )
        },
        lambda dtype: {"input_ids": _tokens(64)},
    ),
    "qwen2": Case(  # tied: lm_head.weight; rotary frequencies in a buffer that no checkpoint has
        transformers.Qwen2ForCausalLM,
        {
            "config": transformers.Qwen2Config(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            )
        },
        lambda dtype: {"input_ids": _tokens(64), "use_cache": False},
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small, threads cost more than they bring: a hundred times more where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    """Each model class in turn."""
    found: Case = request.param
    return found


@pytest.fixture
def module_map(case: Case) -> dict[type[nn.Module], Any]:
    """The map which manages every parameter of the case's model, layer by layer."""
    found: dict[type[nn.Module], Any] = dict.fromkeys(case.as_one_layer, AutoWrappedModule)
    found[nn.Linear] = AutoWrappedLinear
    model = case.build()
    for module in model.modules():
        if module is not model and next(module.parameters(recurse=False), None) is not None:
            face = AutoWrappedNonRecurseModule if next(module.children(), None) else AutoWrappedModule
            found.setdefault(type(module), face)
    return found


@pytest.fixture
def save() -> Callable[[nn.Module, Path], Path]:
    """Save a model as files are published: a tied parameter under its first name only."""

    def write(model: nn.Module, path: Path) -> Path:
        distinct: dict[tuple[int, ...], Tensor] = {}
        state = {}
        for name, tensor in model.state_dict().items():
            storage = (tensor.data_ptr(), *tensor.shape)
            if storage not in distinct or tensor.numel() == 0:
                distinct[storage] = state[name] = tensor.contiguous()
        save_file(state, path)
        return path

    return write
