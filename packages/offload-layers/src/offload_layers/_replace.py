"""Managing a whole model by a map from module classes to layer classes."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offload_layers._errors import ConfigError
from offload_layers._layers import AutoTorchModule, AutoWrappedNonRecurseModule
from offload_layers._lora import LoRAHotLoadMixin
from offload_layers._manage import load_unmanaged, move_buffers, unmanaged_on_meta
from offload_layers._managed import ManagedModule, detach
from offload_layers._placement import Placement, Policy, check_config_keys, parse_device, parse_limit
from offload_layers._quantized import AutoWrappedQuantizedModule, check_quantize, is_quantized
from offload_layers._schedule import Schedule
from offload_layers._source import check_in_source, check_source, trim, with_ties

_log = logging.getLogger("offload_layers.replace")

ModuleMap = Mapping[type[nn.Module], Callable[..., nn.Module]]


def enable_vram_management(
    model: nn.Module,
    module_map: ModuleMap,
    vram_config: Mapping[str, object],
    vram_limit: float | None = None,
    disk_map: Mapping[str, Tensor] | None = None,
    quantize: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Manage the layers of *model* in place, and return it.

    Buffers of modules that the map does not cover are on the computation device then. Their parameters stay
    where they are.

    Args:
        model: The model; its parameters may be on ``meta`` if *disk_map* has their values.
        module_map: Class of module -> ``AutoWrappedLinear``, ``AutoWrappedModule`` or
            ``AutoWrappedNonRecurseModule``. The first entry of which a module is an instance counts. If the
            model itself is an instance of one, it is managed as a single layer.
        vram_config: ``{offload,onload,preparing,computation}_{dtype,device}``; see ``AutoTorchModule``.
        vram_limit: GiB of the computation device that may be in use for layers to stay there; None: no
            limit; 0: nothing stays.
        disk_map: Mapping from names to tensors, which weights on disk are read from. With it, parameters
            on ``meta`` and persistent buffers of modules that the map does not cover are loaded too, to the
            computation device.
        quantize: Tells which linear layers are quantized, by ``quantize.is_quantized_linear(module)``, as
            DiffSynth's ``QuantizeConfig`` does; they become ``AutoWrappedQuantizedModule``, whatever the
            map says, also inside layers of the map.
        **kwargs: Passed to the layer classes.

    Returns:
        *model*, with the attribute ``vram_management_enabled``.

    Raises:
        ConfigError: *vram_config*, *vram_limit* or *module_map* makes no sense, or the model is managed
            already.
        MissingTensorError: a parameter has neither values nor a tensor in *disk_map*.
        ShapeMismatchError: *disk_map* has a tensor of another shape than the model.
    """
    _check_arguments(model, module_map, vram_config, vram_limit, quantize)
    source = check_source(disk_map)
    if source is not None:
        source = with_ties(source, model)
        quantized = tuple(f"{name}." for name, part in model.named_modules() if is_quantized(part, quantize))
        for name, shape in unmanaged_on_meta(model):
            if not name.startswith(quantized):
                check_in_source(source, name, shape)
    policy = Policy.from_config(vram_config)

    target = _target(model, module_map)
    if target is not None:
        _manage_quantized(
            model, quantize, "", **vram_config, vram_limit=vram_limit, disk_map=source, **kwargs
        )
        vram_config = fill_vram_config(model, vram_config)
        model = target(model, **vram_config, vram_limit=vram_limit, disk_map=source, **kwargs)
    else:
        schedule = Schedule()
        enable_vram_management_recursively(
            model,
            module_map,
            vram_config,
            vram_limit=vram_limit,
            disk_map=source,
            quantize=quantize,
            schedule=schedule,
            **kwargs,
        )
        if source is not None:
            load_unmanaged(model, source, policy)
        else:
            move_buffers(model, policy.computation.device)
        layers = [module._owner() for module in model.modules() if isinstance(module, AutoTorchModule)]
        schedule.take_in(layers)
        if not layers:
            classes = ", ".join(c.__name__ for c in module_map)
            _log.warning("%s has no module of the classes in module_map (%s)", type(model).__name__, classes)
    if not policy.offload.is_disk:
        trim(source)
    model.vram_management_enabled = True  # type: ignore[assignment]  # pipelines look for this
    return model


def enable_vram_management_recursively(
    model: nn.Module,
    module_map: ModuleMap,
    vram_config: Mapping[str, object],
    vram_limit: float | None = None,
    name_prefix: str = "",
    disk_map: Mapping[str, Tensor] | None = None,
    quantize: Any = None,
    schedule: Schedule | None = None,
    **kwargs: Any,
) -> None:
    """Manage the layers inside *model*, named *name_prefix*; see `enable_vram_management`."""
    for child_name, module in list(model.named_children()):
        if isinstance(module, AutoTorchModule):  # one module under two names, met before
            continue
        name = f"{name_prefix}.{child_name}" if name_prefix else child_name
        settings: dict[str, Any] = {**vram_config, "vram_limit": vram_limit, "disk_map": disk_map}
        if is_quantized(module, quantize):
            AutoWrappedQuantizedModule(
                module, **settings, name=name, quantize=quantize, schedule=schedule, **kwargs
            )
            continue
        target = _target(module, module_map)
        if target is not None:
            if not _is_non_recurse(target):
                _manage_quantized(module, quantize, name, **settings, schedule=schedule, **kwargs)
            more = kwargs | _if_ours(target, schedule=schedule)
            layer = target(module, **settings, name=name, **more)
            if layer is not module:  # a layer class from elsewhere, which wraps in its own way
                setattr(model, child_name, layer)
            if not isinstance(layer, AutoWrappedNonRecurseModule):
                continue
        enable_vram_management_recursively(
            module,
            module_map,
            vram_config,
            vram_limit=vram_limit,
            name_prefix=name,
            disk_map=disk_map,
            quantize=quantize,
            schedule=schedule,
            **kwargs,
        )


def _manage_quantized(model: nn.Module, quantize: Any, prefix: str, **settings: Any) -> None:
    """Manage the quantized layers inside a module that is to be one layer itself, for themselves."""
    inside = [(name, part) for name, part in model.named_modules() if name and is_quantized(part, quantize)]
    for name, part in inside:
        full = f"{prefix}.{name}" if prefix else name
        AutoWrappedQuantizedModule(part, **settings, name=full, quantize=quantize)


def _is_non_recurse(target: object) -> bool:
    return isinstance(target, type) and issubclass(target, AutoWrappedNonRecurseModule)


def disable_vram_management(
    model: nn.Module, device: str | int | torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Give *model* back plain: every layer has its own class again, and holds its weights itself.

    Args:
        model: A model, or a part of one, of which some layers are managed. Adapters that were added to
            linear layers are dropped.
        device: Where the weights go; by default each stays where it rests, and those on disk come to
            host memory.
        dtype: Their dtype; by default the one in which they are stored.

    Returns:
        *model*, without ``vram_management_enabled``.

    Raises:
        IllegalTransitionError: a layer is computing.
        MissingTensorError: the source no longer has a tensor. The layers before it are plain.
    """
    placement = None
    if device is not None or dtype is not None:
        placement = Placement(parse_device("cpu" if device is None else device), dtype)
    plain: dict[nn.Parameter, nn.Parameter] = {}  # what layers share stays shared
    for module in list(model.modules()):
        if isinstance(module, AutoTorchModule):
            residency = module._owner()
            residency.release(placement, plain)
            if isinstance(module, LoRAHotLoadMixin):
                module.end_lora_hotload()
            parts = list(module.modules()) if module._covers_children else [module]
            for part in parts:
                if isinstance(part, ManagedModule) and part._owner() is residency:
                    detach(part)
    model.__dict__.pop("vram_management_enabled", None)
    return model


def fill_vram_config(model: nn.Module, vram_config: Mapping[str, object]) -> dict[str, object]:
    """Return *vram_config* for a model that is managed as one layer: ready to compute from ONLOAD on."""
    filled = dict(vram_config)
    for role in ("onload", "preparing"):
        for what in ("dtype", "device"):
            filled[f"{role}_{what}"] = vram_config.get(f"computation_{what}")
    if any(vram_config.get(key) != value for key, value in filled.items()):
        _log.info(
            "%s is managed as one layer: onload and preparing are set to computation: %s",
            type(model).__name__,
            filled,
        )
    return filled


def _target(module: nn.Module, module_map: ModuleMap) -> Callable[..., nn.Module] | None:
    return next((target for source, target in module_map.items() if isinstance(module, source)), None)


def _if_ours(target: object, **arguments: object) -> dict[str, object]:
    """Return *arguments* for a layer class of this package, nothing for one from elsewhere."""
    return arguments if isinstance(target, type) and issubclass(target, AutoTorchModule) else {}


def _check_arguments(
    model: nn.Module,
    module_map: object,
    vram_config: Mapping[str, object],
    vram_limit: object,
    quantize: object,
) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"enable_vram_management manages a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(module_map, Mapping):
        raise ConfigError(f"module_map must map module classes to layer classes; got {module_map!r}")
    for source, target in module_map.items():
        if not (isinstance(source, type) and issubclass(source, nn.Module) and callable(target)):
            raise ConfigError(
                f"module_map must map module classes to layer classes; got {source!r}: {target!r}"
            )
    check_config_keys(vram_config)
    parse_limit(vram_limit)
    check_quantize(quantize)
    for name, module in model.named_modules():
        if isinstance(module, ManagedModule):
            raise ConfigError(
                f'layer "{name}" of {type(model).__name__} is managed already; enable management once'
            )
