"""From files to a model that runs within some memory, in one call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import offload_layers
import torch
from offload_layers import Offloaded
from safemap import DiskMap
from skipinit import skip_model_initialization, suspended
from torch import nn

from diffsynth_core_vram._fit import check_fit, tie_aliases

StateDictConverter = Callable[[Any], Mapping[str, Any]]


@suspended()
def offload(
    model_class: Callable[..., nn.Module] | nn.Module,
    path: Any,
    config: Mapping[str, Any] | None = None,
    *,
    device: str | int | torch.device = "cuda",
    vram: str | int = "auto",
    ram: str | int = "auto",
    dtype: torch.dtype | None = None,
    storage_dtype: torch.dtype | None = None,
    state_dict_converter: StateDictConverter | None = None,
    inputs: Mapping[str, Any] | Sequence[Any] | None = None,
) -> Offloaded:
    """Build a model without initializing it, and let it compute with weights that stay where there is room.

    Args:
        model_class: Called as ``model_class(**config)``, or a model that is built already.
        path: Its checkpoint, as for ``DiskMap``.
        config: Keyword arguments of *model_class*.
        device: Where the model computes.
        vram: Memory of the device for weights: ``"8GB"``, bytes, or ``"auto"``.
        ram: Memory of the host for weights, likewise.
        dtype: In which the model computes; None: each weight in that of the checkpoint.
        storage_dtype: In which weights wait in host memory, e.g. eight-bit floats; None: as they are.
        state_dict_converter: As for ``load_model``.
        inputs: What the model will be called with, for ``report()`` to have a prediction: keyword arguments,
            or a sequence of positional ones; see ``offload_layers.plan``.

    Returns:
        A handle on the model, which is in evaluation mode; see ``offload_layers.offload``.

    Raises:
        CheckpointMismatchError: tensors are missing, unexpected or of another shape, or complex where the
            model is real and *dtype* is.
        ConfigError: the model cannot fit, or an argument makes no sense.
    """
    if isinstance(model_class, nn.Module):
        model = model_class
    else:
        with skip_model_initialization():
            model = model_class(**(config or {}))
    source = DiskMap(path, state_dict_converter=state_dict_converter, unwrap=state_dict_converter is None)
    check_fit(model, source, tie_aliases(model, source), casts=dtype is not None and not dtype.is_complex)
    return offload_layers.offload(
        model.eval(),
        device=device,
        vram=vram,
        ram=ram,
        source=source,
        dtype=dtype,
        storage_dtype=storage_dtype,
        inputs=inputs,
    )
