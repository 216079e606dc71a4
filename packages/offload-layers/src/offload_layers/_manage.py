"""Taking over one layer: collect its parameters, put them where they rest, change its class."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from offload_layers._device import device_of
from offload_layers._errors import ConfigError, MissingTensorError
from offload_layers._managed import ManagedModule, attach, names_of, swap_classes
from offload_layers._packed import PackedWeight
from offload_layers._placement import Placement, Policy
from offload_layers._residency import Residency
from offload_layers._schedule import Schedule
from offload_layers._shared import SharedCopies
from offload_layers._source import (
    Source,
    check_in_source,
    check_shape,
    check_source,
    read_tensor,
    stored_dtype,
)
from offload_layers._transfer import convert, on_meta, parameter_like
from offload_layers._weight import Slot, Weight


def manage(
    module: nn.Module,
    face: type[ManagedModule],
    policy: Policy,
    *,
    name: str,
    source: Source | None,
    limit: int | None,
    recurse: bool,
    schedule: Schedule | None = None,
) -> Residency:
    """Let a new residency own the parameters of *module*, which becomes an instance of *face*.

    Everything that can be refused is refused before anything changes.
    """
    source = check_source(source)
    modules = list(dict.fromkeys(_parts(module))) if recurse else [module]
    for part in modules:
        if isinstance(part, ManagedModule):
            raise ConfigError(
                f'layer "{name}" of class {type(part).__name__} is managed already; wrap a layer once'
            )
    weights, own = _collect(module, modules, name, face)
    shared = SharedCopies() if schedule is None else schedule.shared
    homes = [_home(weight, policy, source, shared) for weight in weights]
    buffers = [Slot(part, key) for part in modules for key in part._buffers if key not in own[part]]
    loaded = []
    if source is not None and not face._owns_buffers:
        stored = _stored_buffers(module, modules, name, source)
        # a copy, since forward may write to it
        loaded = [(part, key, _read_buffer(part, key, full, source).clone()) for part, key, full in stored]

    swap_classes(modules, face, module)
    for weight, home in zip(weights, homes, strict=True):
        weight.register(home)
    for part, key, values in loaded:
        part._buffers[key] = values
    residency = Residency(name, weights, buffers, policy, source=source, limit=limit, schedule=schedule)
    for part in modules:
        attach(part, residency, own[part])
    return residency


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield *module* and the modules inside it, apart from layers that are managed for themselves."""
    yield module
    for child in module.children():
        if not (isinstance(child, ManagedModule) and child._stands_alone):
            yield from _parts(child)


def _collect(
    module: nn.Module, modules: list[nn.Module], prefix: str, face: type[ManagedModule]
) -> tuple[list[Weight], dict[nn.Module, dict[str, Weight]]]:
    """Return one weight per distinct parameter, and for each module its weights by attribute name."""
    names = {part: n for n, part in module.named_modules()}
    by_parameter: dict[int, Weight] = {}
    own: dict[nn.Module, dict[str, Weight]] = {part: {} for part in modules}
    for part in modules:
        for attribute in itertools.chain(*names_of(part, with_buffers=face._owns_buffers)):
            parameter = Slot(part, attribute).tensor
            if parameter is not None and nn.parameter.is_lazy(parameter):
                raise ConfigError(
                    f'parameter "{attribute}" of layer "{prefix}" has no shape yet; run the model once'
                )
            weight = by_parameter.get(id(parameter))
            if weight is None:
                full = ".".join(filter(None, (prefix, names[part], attribute)))
                weight = by_parameter[id(parameter)] = face._weight_class(full, [])
            weight.slots.append(Slot(part, attribute))
            own[part][attribute] = weight
    return list(by_parameter.values()), own


def _home(weight: Weight, policy: Policy, source: Source | None, shared: SharedCopies) -> nn.Parameter:
    """Return what the model holds of *weight* at rest."""
    if isinstance(weight, PackedWeight):
        return weight.home(policy, source)
    parameter = weight.registered
    if policy.offload.is_disk and source is None:
        raise ConfigError(
            f'parameter "{weight.name}" is to be kept on disk, but there is no disk map to read it from. '
            "Pass disk_map=DiskMap(path)."
        )
    if policy.offload.is_disk and source is not None and (parameter.is_meta or weight.name in source):
        check_in_source(source, weight.name, parameter.shape)
        dtype = policy.computation.dtype_for(stored_dtype(source, weight.name, parameter.dtype))
        on_disk = Placement(torch.device("meta"), dtype)
        return shared.of(weight, on_disk, source, lambda w: on_meta(w.registered, dtype))
    if parameter.is_meta and source is not None:
        check_in_source(source, weight.name, parameter.shape)
    if policy.offload.is_disk:
        return parameter  # not in the checkpoint, but in the model: its values stay in memory
    return shared.of(weight, policy.offload, source, lambda w: w.copy_to(policy.offload, source))


def _stored_buffers(
    module: nn.Module, modules: list[nn.Module], prefix: str, source: Source
) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield module, key and name in the source of each persistent buffer that the source has values for."""
    names = {part: n for n, part in module.named_modules()}
    for part in modules:
        for key, buffer in part._buffers.items():
            full = ".".join(filter(None, (prefix, names[part], key)))
            if buffer is not None and key not in part._non_persistent_buffers_set and full in source:
                yield part, key, full


def _read_buffer(module: nn.Module, key: str, name: str, source: Source) -> Tensor:
    values, buffer = read_tensor(source, name), module._buffers[key]
    assert buffer is not None
    check_shape(name, tuple(values.shape), buffer.shape)
    return values


def load_unmanaged(model: nn.Module, source: Source, policy: Policy) -> None:
    """Give values to the parameters on ``meta``, and to the persistent buffers, that no layer manages.

    They go to the computation device in the dtype of the source; eight-bit floats, in which nothing
    computes by itself, become the computation dtype. Buffers that the source lacks go there as they are.
    """
    for name, module in model.named_modules():
        if isinstance(module, ManagedModule):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                full = f"{name}.{key}" if name else key
                check_in_source(source, full, parameter.shape)
                values = read_tensor(source, full)
                module._parameters[key] = parameter_like(parameter, _for_computation(values, policy))
        for part, key, full in _stored_buffers(module, [module], name, source):
            values = _read_buffer(part, key, full, source)
            part._buffers[key] = _for_computation(values, policy).clone()
    move_buffers(model, policy.computation.device)
    device_of(policy.computation.device).synchronize()  # see Note [Any stream may compute]


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring the buffers that no layer moves to *device*."""
    for module in model.modules():
        if isinstance(module, ManagedModule):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def nbytes_on(model: nn.Module, device: torch.device) -> int:
    """Return the bytes that the parameters of *model* have on *device* between forwards."""
    there = {parameter for parameter in model.parameters() if parameter.device == device}
    return sum(parameter.numel() * parameter.element_size() for parameter in there)


def _for_computation(values: Tensor, policy: Policy) -> Tensor:
    is_eight_bit_float = values.is_floating_point() and values.dtype.itemsize == 1
    dtype = policy.computation.dtype if is_eight_bit_float else None
    return convert(values, type(policy.computation)(policy.computation.device, dtype))


def check_buffers(model: nn.Module, source: Source | None) -> None:
    """Raise ``MissingTensorError`` for a buffer that has no values and gets none from *source*."""
    for prefix, module in model.named_modules():
        stored = {full for *_, full in _stored_buffers(module, [module], prefix, source or {})}
        for key, buffer in module._buffers.items():
            name = f"{prefix}.{key}" if prefix else key
            if buffer is not None and buffer.is_meta and name not in stored:
                raise MissingTensorError(
                    f'buffer "{name}" has no values, and no source gives it any. Build the model such that '
                    'its buffers have values, and only its parameters are on "meta".'
                )


def unmanaged_on_meta(model: nn.Module) -> list[tuple[str, torch.Size]]:
    """Return name and shape of each parameter that has no values."""
    return [(name, p.shape) for name, p in model.named_parameters() if p.is_meta]
