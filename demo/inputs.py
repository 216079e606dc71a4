"""Inputs of one forward: built in for two architectures, described by the user for others."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from job import DemoError, resolve

SIDE = 32  # 32 x 32 image tokens are 512 x 512 pixels for both architectures below
TEXT = 64  # text tokens

Spec = str | Mapping[str, Any] | None


def make_inputs(spec: Spec, model: torch.nn.Module, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Keyword arguments for the forward of *model*, the same ones for the same *seed*."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(spec, str):
        made = resolve(spec)(model, generator)
        if not isinstance(made, dict):
            raise DemoError(f"{spec} returned {type(made).__name__}; expected a dict of keyword arguments")
        return made
    if spec is not None:
        return {name: _described(name, entry, dtype, generator) for name, entry in spec.items()}
    for cls in type(model).__mro__:
        if cls.__name__ in BUILT_IN:
            return BUILT_IN[cls.__name__](model, dtype, generator)
    raise DemoError(
        f"{type(model).__name__} has no built-in inputs (those with: {', '.join(BUILT_IN)}). Pass --inputs "
        f"with a JSON object of name: {{shape, dtype}} or with module:function; forward takes "
        f"{inspect.signature(type(model).forward)}"
    )


def _described(name: str, entry: Any, default: torch.dtype, generator: torch.Generator) -> Any:
    """Normal values if floating, zeros and ones if integer, true if bool; entries without a shape stay."""
    if not (isinstance(entry, Mapping) and "shape" in entry):
        return entry
    dtype = getattr(torch, str(entry["dtype"]), None) if "dtype" in entry else default
    if not isinstance(dtype, torch.dtype):
        raise DemoError(f"--inputs: {name}: {entry['dtype']!r} is no dtype of torch")
    if dtype is torch.bool:
        return torch.ones(entry["shape"], dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(entry["shape"], generator=generator).to(dtype)
    return torch.randint(0, 2, entry["shape"], generator=generator).to(dtype)


def _qwen_image(model: Any, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": torch.randn(1, SIDE * SIDE, config.in_channels, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, generator=generator).to(
            dtype
        ),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_shapes": [[(1, SIDE, SIDE)]],
        "return_dict": False,
    }


def _flux(model: Any, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    config = model.config
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(1, SIDE * SIDE, config.in_channels, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, generator=generator).to(
            dtype
        ),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator).to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(dtype),
        "txt_ids": torch.zeros(TEXT, 3, dtype=dtype),
        "return_dict": False,
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.tensor([3.5], dtype=dtype)
    return inputs


BUILT_IN = {"QwenImageTransformer2DModel": _qwen_image, "FluxTransformer2DModel": _flux}
