"""From files to a model that is ready to run: skipped initialization, lazy reading, managed layers."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from offload_layers import (
    AutoTorchModule,
    AutoWrappedNonRecurseModule,
    Placement,
    Policy,
    enable_vram_management,
)
from safemap import DiskMap
from skipinit import skip_model_initialization, suspended
from torch import Tensor, nn

from diffsynth_core_vram._fit import check_fit, tie_aliases
from diffsynth_core_vram._progress import Watched
from diffsynth_core_vram._quantize import check_quantize, load_quantized, metadata_of, stays_packed
from diffsynth_core_vram._shared import Shared

Model = TypeVar("Model", bound=nn.Module)
StateDictConverter = Callable[[Any], Mapping[str, Any]]


@suspended()
def load_model(
    model_class: Callable[..., Model],
    path: Any,
    config: Mapping[str, Any] | None = None,
    torch_dtype: torch.dtype | None = torch.bfloat16,
    device: str | torch.device = "cpu",
    state_dict_converter: StateDictConverter | None = None,
    use_disk_map: bool = False,
    module_map: Mapping[type[nn.Module], Callable[..., nn.Module]] | None = None,
    vram_config: Mapping[str, Any] | None = None,
    vram_limit: float | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    quantize: Any = None,
) -> Model:
    """Build a model without initializing it, and give it the weights of a checkpoint, in evaluation mode.

    Names and shapes are checked before any weight is read.  Then each tensor is read once and goes straight
    to the dtype and device where it stays, so that the peak is the model and one tensor.

    Args:
        model_class: Called as ``model_class(**config)``; most often a subclass of ``torch.nn.Module``.
        path: A file, a list of shards, a ``*.index.json`` or a folder, as for ``DiskMap``.
        config: Keyword arguments of *model_class*.
        torch_dtype: Dtype of the model; None keeps the dtypes of the checkpoint.  As with ``Module.to``,
            integers keep theirs, and unlike there complex numbers, too.  Without effect on a managed model.
        device: Where the model is.  Without effect on a managed model.
        state_dict_converter: Called once with the checkpoint as a dict of tensors; returns one in the names
            of the model.  Its tensors are lazy: what it computes is evaluated tensor by tensor when the
            model needs it, also by layers that stay on disk.
        use_disk_map: Give *state_dict_converter* the contents of a pickled file as they are.  Otherwise
            the single key ``state_dict``, ``module`` or ``model_state`` of such a file is looked into, as it
            always is without a converter.  Files are read lazily in any case.
        module_map: Class of module -> ``AutoWrappedLinear`` or a relative.  With it the model is managed:
            *vram_config* says where its layers are, and in which dtypes.
        vram_config: ``{offload,onload,preparing,computation}_{dtype,device}``.  Without effect unless
            *module_map* is given.
        vram_limit: GiB of the computation device that may be in use for managed layers to stay there; None:
            no limit; 0: nothing stays.
        state_dict: Names to tensors, used instead of the files at *path*.
        quantize: An object such as DiffSynth's ``QuantizeConfig``: it quantizes the model once that is
            loaded, or, with ``load_prequantized``, prepares it for a checkpoint that is quantized already.
            The model keeps it as ``quantize_config``. Managed layers that are quantized move as they are.

    Returns:
        The model.  Layers kept on disk go on reading the files, which must stay as they are.  A block of
        ``skip_model_initialization()`` around the call makes no difference.

    Raises:
        CheckpointMismatchError: tensors are missing, unexpected or of another shape, or complex where the
            model is real.
        ValueError: *module_map* without *vram_config*, or settings that make no sense.

    A checkpoint that is missing, damaged or in parts raises the errors of ``DiskMap``.
    """
    if quantize is not None:
        check_quantize(quantize)
    if module_map is not None and vram_config is None:
        raise ValueError("module_map says which layers are managed, vram_config where they are: pass both")
    policy = Policy.from_config(vram_config or {}) if module_map is not None else None

    with skip_model_initialization():
        model = model_class(**(config or {}))
    source: Mapping[str, Tensor]
    if state_dict is not None:
        source = state_dict if state_dict_converter is None else state_dict_converter(state_dict)
    else:
        source = DiskMap(
            path,
            device if policy is None else "cpu",
            state_dict_converter=state_dict_converter,
            unwrap=state_dict_converter is None or (policy is None and not use_disk_map),
        )
    metadata = metadata_of(source)
    label = f"Loading {type(model).__name__}"

    def manage(model: Model, source: Mapping[str, Tensor] | None) -> Model:
        managed = enable_vram_management(
            model,
            module_map or {},
            vram_config or {},
            vram_limit,
            source,
            quantize,
            **({"metadata": metadata} if quantize is not None else {}),
        )
        _cast_unmanaged(managed, None if policy is None else policy.computation.dtype)
        return cast("Model", managed.eval())

    if quantize is not None:
        if policy is not None and stays_packed(quantize, on_disk=policy.offload.is_disk):
            model = quantize.prepare_for_prequantized_load(model, compute_dtype=policy.computation.dtype)
            loaded = manage(model, source)
        else:
            placement = Placement(torch.device(device), torch_dtype) if policy is None else policy.computation
            with Watched(source, label) as watched:
                loaded = load_quantized(
                    model,
                    watched,
                    quantize,
                    lambda source: _assign(
                        model,
                        source,
                        _fit(model, source, placement.dtype),
                        placement.dtype,
                        placement.device,
                    ),
                    metadata=metadata,
                    computation=placement,
                    device=placement.device if policy is None else policy.offload.device,
                )
            loaded = loaded.eval() if policy is None else manage(loaded, None)
        loaded.quantize_config = quantize  # adapters are added accordingly
        return loaded

    aliases = _fit(model, source, torch_dtype if policy is None else policy.computation.dtype)
    if policy is None:
        with Watched(source, label) as watched:
            _assign(model, watched, aliases, torch_dtype, device)
        return _converted(model, torch_dtype, device).eval()
    if policy.offload.is_disk:  # almost nothing is read now
        return manage(model, source)
    at_rest = partial(_placed, dtype=policy.offload.dtype, device=policy.offload.device)
    with Watched(Shared(source, aliases, at_rest), label) as watched:
        return manage(model, watched)


def _fit(model: nn.Module, source: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, str]:
    """Check that *source* fits *model* in *dtype*; return which names are others of tied parameters."""
    aliases = tie_aliases(model, source)
    check_fit(model, source, aliases, casts=dtype is not None and not dtype.is_complex)
    return aliases


def _assign(
    model: nn.Module,
    source: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> None:
    """Let *model* hold the tensors of *source* themselves; a tied parameter stays one object."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Any] = {}
    for name in {**dict.fromkeys(source), **aliases}:
        first = aliases.get(name, name)
        if first not in state:
            tensor = source[first]
            if isinstance(tensor, Tensor):  # extra state need not be one
                tensor = _placed(tensor, dtype, device)
            if first in aliases:
                if (tensor.shape, parameters[first].shape) == ((1,), ()):
                    tensor = tensor[0]  # as torch would, which makes another parameter for each name
                tensor = nn.Parameter(tensor, requires_grad=parameters[first].requires_grad)
            state[first] = tensor
        state[name] = state[first]
    model.load_state_dict(state, assign=True)


def _converted(model: Model, dtype: torch.dtype | None, device: str | torch.device) -> Model:
    """Bring the buffers of *model* to *dtype* and *device*; classes may have a ``to`` of their own.

    ``Module.to`` makes complex tensors real, which drops their imaginary parts; here they keep their dtype.
    """
    is_real = not any(tensor.is_complex() for tensor in (*model.parameters(), *model.buffers()))
    if is_real or dtype is None or dtype.is_complex:
        return model.to(dtype=dtype, device=device)
    model = model.to(device=device)
    model._apply(lambda tensor: _placed(tensor, dtype, device))  # type: ignore[no-untyped-call]
    return model


def _placed(tensor: Tensor, dtype: torch.dtype | None, device: str | torch.device) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _cast_unmanaged(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give the parameters that no layer manages the dtype in which the layers around them compute."""
    if dtype is None or dtype.itemsize == 1:  # nothing but a linear layer computes in eight bits
        return
    layers = [module for module in model.modules() if isinstance(module, AutoTorchModule)]
    managed = {
        parameter
        for layer in layers
        for parameter in layer.parameters(recurse=not isinstance(layer, AutoWrappedNonRecurseModule))
    }
    for parameter in model.parameters():
        if parameter not in managed and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
