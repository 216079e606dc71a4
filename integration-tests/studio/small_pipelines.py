"""Two whole pipelines of DiffSynth-Studio from small random components: plain, or loaded from files."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from configurations import CONFIGURATIONS
from safetensors.torch import save_file
from studio_case import Case
from studio_cases import CASES
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<unk>",
    *["user", "assistant", ":", "a", "cat", "dog", "on", "the", "moon", "in", "rain", "blurry"],
]


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a vocabulary of a few words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=length
    )
    fast.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"
    return fast


@dataclass(frozen=True)
class SmallPipeline:
    """A pipeline, its components under the names that DiffSynth-Studio gives them, and one call."""

    name: str  # of the class, in its module below diffsynth.pipelines
    components: Mapping[str, Case]  # by attribute of the pipeline
    model_names: Mapping[str, str]  # by attribute, what configs/model_configs.py calls it
    dtype: torch.dtype
    tokens: int
    call: Mapping[str, Any]
    denoiser: str  # attribute of the model that is called in every step

    @property
    def pipeline_class(self) -> Any:
        """The class."""
        import importlib

        module, name = self.name.rsplit(".", 1)
        return getattr(importlib.import_module(f"diffsynth.pipelines.{module}"), name)

    def plain(self) -> Any:
        """Put the pipeline together by hand, from plain models."""
        pipe = self.pipeline_class(device="cpu", torch_dtype=self.dtype)
        for attribute, case in self.components.items():
            setattr(pipe, attribute, case.build())
        pipe.tokenizer = tokenizer(self.tokens)
        return _exact(pipe)

    def load(self, configuration: str, folder: Path, known: list[Any], limit: float | None = None) -> Any:
        """Let DiffSynth-Studio load the pipeline from files that it recognises by what *known* lists."""
        from diffsynth.core import ModelConfig
        from diffsynth.core.loader.file import hash_model_file

        configs = []
        with ExitStack() as stack:
            for attribute, case in self.components.items():
                path = folder / f"{attribute}.safetensors"
                save_file(case.build().state_dict(), path)
                known.append(
                    {
                        "model_hash": hash_model_file(str(path)),
                        "model_name": self.model_names[attribute],
                        "model_class": case.model_class,
                        "extra_kwargs": dict(case.config),
                    }
                )
                stack.enter_context(case.small())
                configs.append(ModelConfig(path=str(path), **CONFIGURATIONS[configuration](self.dtype)))
            tokenizer(self.tokens).save_pretrained(folder / "tokenizer")
            pipe = self.pipeline_class.from_pretrained(
                torch_dtype=self.dtype, device="cpu", model_configs=configs,
                tokenizer_config=ModelConfig(path=str(folder / "tokenizer")), vram_limit=limit,
            )  # fmt: skip
        return _exact(pipe)

    def run(self, pipe: Any, **kwargs: Any) -> Tensor:
        """Make a picture; return it before it is rounded to integers."""
        picture = pipe(**{**self.call, "progress_bar_cmd": lambda steps: steps, **kwargs})
        assert isinstance(picture, Tensor)
        assert picture.isfinite().all()
        assert picture.float().std() > 1e-3
        return picture

    def lora(self, seed: int, keep: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """Random low-rank changes of the linear layers of the denoiser."""
        generator = torch.Generator().manual_seed(seed)
        model = self.components[self.denoiser].build()
        state = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and keep(name):
                for side, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2))):
                    values = torch.randn(shape, generator=generator) * 0.1
                    state[f"{name}.lora_{side}.weight"] = values.to(self.dtype)
        return state


def _exact(pipe: Any) -> Any:
    """Let *pipe* return the picture as it was computed."""
    pipe.vae_output_to_image = lambda picture: picture
    return pipe


def _changed(name: str, **config: Any) -> Case:
    case = CASES[name]
    return dataclasses.replace(case, config={**case.config, **config})


PIPELINES = {
    "z-image": SmallPipeline(
        "z_image.ZImagePipeline",
        {
            "text_encoder": CASES["z-image-text-encoder"],
            "dit": _changed("z-image", in_channels=16, cap_feat_dim=32),
            "vae_decoder": CASES["flux-vae-decoder"],
        },
        {"text_encoder": "z_image_text_encoder", "dit": "z_image_dit", "vae_decoder": "flux_vae_decoder"},
        torch.bfloat16,
        512,
        {
            "prompt": "a cat on the moon", "negative_prompt": "blurry", "cfg_scale": 2.0, "seed": 1,
            "height": 32, "width": 32, "num_inference_steps": 2,
        },
        "dit",
    ),
    "stable-diffusion": SmallPipeline(
        "stable_diffusion.StableDiffusionPipeline",
        {
            "text_encoder": dataclasses.replace(CASES["clip"], dtype=torch.float32),
            "unet": _changed("stable-diffusion-unet", cross_attention_dim=32),
            "vae": CASES["stable-diffusion-vae"],
        },
        {
            "text_encoder": "stable_diffusion_text_encoder", "unet": "stable_diffusion_unet",
            "vae": "stable_diffusion_vae",
        },
        torch.float32,
        16,
        {
            "prompt": "a dog in the rain", "negative_prompt": "blurry", "seed": 1, "height": 64, "width": 64,
            "num_inference_steps": 2,
        },
        "unet",
    ),
}  # fmt: skip
