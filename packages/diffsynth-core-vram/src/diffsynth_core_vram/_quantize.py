"""Loading quantized models: the order in which an object such as DiffSynth's ``QuantizeConfig`` is asked.

A checkpoint that is quantized already fills empty layers that the object has prepared. Otherwise the model is
loaded as it is and the object quantizes it.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from offload_layers import Placement
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def check_quantize(quantize: Any) -> None:
    """Raise ``ValueError`` unless *quantize* can be asked what loading needs."""
    needed = ["is_quantized_linear", "load_prequantized", "mode", "quantize_model", "dequantize_model"]
    if getattr(quantize, "load_prequantized", False):
        needed += ["prepare_for_prequantized_load", "unflatten_state_dict"]
    if missing := [name for name in needed if not hasattr(quantize, name)]:
        raise ValueError(
            f"quantize must be an object such as DiffSynth's QuantizeConfig; {quantize!r} has no "
            f"{', '.join(missing)}"
        )


def stays_packed(quantize: Any, *, on_disk: bool) -> bool:
    """Say whether managed layers can be filled from the checkpoint as it is, one by one.

    Raises:
        ValueError: layers are to be on disk, where only a checkpoint that is quantized already can be read.
    """
    if on_disk and not quantize.load_prequantized:
        raise ValueError(
            "layers can be quantized on disk only if the checkpoint is: pass a pre-quantized checkpoint and "
            'load_prequantized=True, or an offload_device other than "disk"'
        )
    return bool(quantize.load_prequantized and (on_disk or quantize.mode == "dynamic"))


def metadata_of(source: object) -> dict[str, str]:
    """Return the text that a checkpoint's header has beside its tensors."""
    return dict(getattr(source, "metadata", None) or {})


def load_quantized(
    model: Model,
    source: Mapping[str, Tensor],
    quantize: Any,
    load: Callable[[Mapping[str, Tensor]], None],
    *,
    metadata: dict[str, str],
    computation: Placement,
    device: torch.device,
) -> Model:
    """Return *model* with the weights of *source*, quantized, on *device*.

    *load* gives the model the weights of a source that is not quantized. *computation* says where the
    quantization is computed, and the dtype of everything that is not quantized.
    """
    dtype = computation.dtype or torch.bfloat16
    if quantize.load_prequantized:
        model = quantize.prepare_for_prequantized_load(model, compute_dtype=dtype)
        model.load_state_dict(quantize.unflatten_state_dict(dict(source), metadata), assign=True)
    else:
        load(source)
    where = {"compute_device": computation.device, "model_device": device}
    model = quantize.quantize_model(model, **where)
    model = quantize.dequantize_model(model, compute_dtype=dtype, **where)
    _place(model, quantize, computation.dtype, device)
    return model


def _place(module: nn.Module, quantize: Any, dtype: torch.dtype | None, device: str | torch.device) -> None:
    """Bring *module* to *device* and *dtype*, except that quantized layers keep their dtypes."""
    if quantize.is_quantized_linear(module):
        module.to(device=device)
        return
    for child in module.children():
        _place(child, quantize, dtype, device)
    module._apply(lambda t: t.to(device, dtype if t.is_floating_point() else None), recurse=False)  # type: ignore[no-untyped-call]
