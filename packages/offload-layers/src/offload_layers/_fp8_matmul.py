"""Linear layers that compute in eight-bit floats, by ``torch._scaled_mm``.

Weights are rounded to eight bits as they are. Inputs are rounded while the layer runs, each row divided by a
scale of its own if its largest number is beyond the format's; the product is multiplied by the scales again.
So the result is that of the dequantized inputs and weights, summed in float32.

Gradients flow to the input, as if it had not been rounded, and to nothing else.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._device import describe
from offload_layers._errors import ConfigError
from offload_layers._fp8 import FP8
from offload_layers._placement import Placement

#: formats of which both sides of a product can be; those with two bits of mantissa can be one side at most
COMPUTABLE = frozenset({torch.float8_e4m3fn, torch.float8_e4m3fnuz})
_MULTIPLE = 16  # of both sizes of a weight, where a GPU is to multiply. Source: torch._scaled_mm's own checks


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` ``(..., out)`` in the dtype of *x*.

    Args:
        x: Input ``(..., in)``, sixteen or thirty-two bits.
        weight: ``(out, in)`` in one of `COMPUTABLE`.
        bias: ``(out,)``, of any dtype, added in bfloat16.

    A weight whose sizes the device cannot multiply in eight bits is multiplied in the dtype of *x*.
    """
    out_features, in_features = weight.shape
    fits = x.device.type == "cpu" or not (out_features % _MULTIPLE or in_features % _MULTIPLE)
    if not fits or not x.numel():
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if torch.is_grad_enabled() and x.requires_grad:
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    return _multiply(x, weight, bias)


def row_scales(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what each of *rows* ``(rows, in)`` is divided by to fit *dtype*: ``(rows, 1)`` in float32."""
    largest = rows.abs().amax(dim=-1, keepdim=True).float()
    return (largest / torch.finfo(dtype).max).clamp(min=1.0)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    scales = row_scales(rows, weight.dtype)
    out = torch._scaled_mm(
        (rows / scales).to(weight.dtype, memory_format=torch.contiguous_format),
        weight.contiguous().t(),  # by columns, as the operation wants it
        scale_a=scales,
        scale_b=torch.ones(1, weight.shape[0], device=x.device),
        bias=None if bias is None else bias.to(torch.bfloat16),
        # GPUs scale rows for bfloat16 only
        out_dtype=x.dtype if x.device.type == "cpu" else torch.bfloat16,
    )
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ weight.to(gradient.dtype), None, None


def check_computes(module: nn.Module, computation: Placement, *, recurse: bool) -> None:
    """Raise ``ConfigError`` if *module*, not a matrix product, would have to compute in eight bits."""
    if computation.dtype in FP8 and any(p.is_floating_point() for p in module.parameters(recurse)):
        name = type(module).__name__
        raise ConfigError(
            f"{name} cannot compute in {_short(computation.dtype)}: only linear layers can, in "
            f"AutoWrappedLinear. Leave {name} out of module_map, or set computation_dtype=torch.bfloat16"
        )


def check_multiplies(module: nn.Linear, computation: Placement) -> None:
    """Raise ``ConfigError`` if *module* would have to compute in eight bits, but cannot."""
    dtype = computation.dtype
    if dtype not in FP8:
        return
    if dtype not in COMPUTABLE:
        raise ConfigError(
            f"computation_dtype {_short(dtype)} cannot be multiplied with itself on any device; set "
            "computation_dtype=torch.float8_e4m3fn, or torch.bfloat16"
        )
    if type(module).forward is not nn.Linear.forward:
        raise ConfigError(
            f"{type(module).__name__} has a forward of its own, which cannot compute in {_short(dtype)}; use "
            "nn.Linear, or set computation_dtype=torch.bfloat16"
        )
    reason = _why_not(computation.device, dtype)
    if reason is not None:
        raise ConfigError(
            f"computation_dtype {_short(dtype)} needs a device that multiplies eight-bit floats (CUDA: "
            f"compute capability 8.9 or more); this is {describe(computation.device)}, where torch says: "
            f"{reason} Set computation_dtype=torch.bfloat16"
        )


@functools.lru_cache
def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Try it: return None if *device* multiplies matrices of *dtype*, else what torch says."""
    try:
        with torch.no_grad():
            weight = torch.ones(_MULTIPLE, _MULTIPLE, device=device).to(dtype)
            _multiply(torch.ones(_MULTIPLE, _MULTIPLE, device=device, dtype=torch.bfloat16), weight, None)
    except Exception as error:  # of whatever kind: a missing kernel, a driver, a device that is not there
        return str(error).partition("\n")[0].rstrip(".") + "."
    return None


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
