"""The one call: manage a whole model by two amounts of memory."""

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offload_layers._errors import ConfigError
from offload_layers._find import Found, find_layers
from offload_layers._fp8 import FP8
from offload_layers._handle import Offloaded
from offload_layers._headers import find_files
from offload_layers._layer_sizes import LayerSize, sizes_of, sizes_of_files, sizes_of_mapping
from offload_layers._layers import AutoTorchModule
from offload_layers._lora import LoRAHotLoadMixin
from offload_layers._machine import AUTO_SHARE, Size, available_ram, foreign_nbytes, vram_limit
from offload_layers._manage import check_buffers, load_unmanaged, move_buffers, nbytes_on
from offload_layers._managed import ManagedModule, detach
from offload_layers._placement import DISK, Placement, Policy, check_keeps_values, parse_device
from offload_layers._plan import Plan, make_plan
from offload_layers._presented import end_presenting, present
from offload_layers._probe import probe
from offload_layers._rates import Rates
from offload_layers._schedule import Schedule
from offload_layers._sizes import parse_size
from offload_layers._source import Source, check_source, is_source, offered, trim, with_ties
from offload_layers._tier import Tier
from offload_layers._trace import Inputs
from offload_layers._work import Work, measure_work

_log = logging.getLogger("offload_layers.offload")
_CPU = torch.device("cpu")

_TYPICAL_ROWS = 4096  # tokens of a picture of 1024 by 1024


def offload(
    model: nn.Module,
    *,
    device: str | int | torch.device = "cuda",
    vram: Size = "auto",
    ram: Size = "auto",
    source: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    storage_dtype: torch.dtype | None = None,
    rows: int = _TYPICAL_ROWS,
    inputs: Inputs | None = None,
    rates: Rates | None = None,
) -> Offloaded:
    """Let *model* compute on *device* within *vram* bytes of its memory and *ram* bytes of the host's.

    Every module that has parameters is managed, no map is needed. What fits stays on the device: the weights
    that hide least behind computation. What does not fit there stays in host memory, and what does not fit
    there either is read from *source* in each forward.

    Args:
        model: The model; parameters that *source* has may be on ``meta``.
        device: Where it computes.
        vram: Memory of the device that may be in use for weights: ``"8GB"``, ``"7.5 GiB"``, bytes, or
            ``"auto"``. On a CPU there is one memory, and it is *ram* that counts.
        ram: Memory of the host for weights, likewise. ``"auto"`` adds what weights take that are there
            already and stay.
        source: Mapping from names to tensors, e.g. ``safemap.DiskMap``. Without one, weights stay in memory.
        dtype: In which the model computes; None: each weight in its own. Buffers keep theirs.
        storage_dtype: In which weights wait in host memory, e.g. eight-bit floats; None: as they are.
        rows: Rows of a layer's input, such as tokens, for which the plan predicts a forward.
        inputs: In place of *rows*, what the model will be called with; see `plan`.
        rates: Of the machine, from `probe`; None: no time is predicted, unless there are *inputs*.

    Returns:
        A handle; the model itself can be used as before.

    Raises:
        ConfigError: it cannot fit, or an argument makes no sense, or the forward cannot be foreseen; nothing
            was changed.
        MissingTensorError: a parameter or buffer has neither values nor a tensor in *source*.
        ShapeMismatchError: *source* has a tensor of another shape.
    """
    target = parse_device(device)
    _check_arguments(dtype, storage_dtype, rows)
    given = check_source(source, setting="source")
    checked = None if given is None else with_ties(given, model)
    found = _find(model)
    check_buffers(model, checked)
    sizes = sizes_of(found, checked, dtype, storage_dtype)
    ahead = _fetches_ahead(target, checked)
    work = None if inputs is None else _work(model, inputs, found, target, dtype, checked)
    if rates is None and inputs is not None:
        rates = probe(target, file=_file_of(given), dtype=dtype or _computed_in(sizes))
    held = _Held.by(model, found, sizes, target)
    plan = _plan(sizes, target, vram, ram, held, rows=rows, rates=rates, fetches_ahead=ahead, work=work)

    schedule = Schedule(plan.beside_nbytes)
    computation = Placement(target, dtype)
    before = _Snapshot(model)
    layers: list[AutoTorchModule] = []
    try:
        for layer, planned in zip(found, plan.layers, strict=True):
            its_source = checked if layer.is_in(checked) else None
            policy = _policy(planned.tier, computation, storage_dtype, its_source)
            managed: Any = layer.face._manage(
                layer.module,
                policy,
                name=layer.name,
                source=checked,
                limit=plan.limit_nbytes,
                schedule=schedule,
            )
            layers.append(managed)
        if checked is not None:
            load_unmanaged(model, checked, Policy(DISK, DISK, computation, computation))
        schedule.take_in([layer._owner() for layer in layers])
        move_buffers(model, target)
        present(model, target)
        handle = Offloaded(model, plan)
        handle.onload()
    except BaseException:
        end_presenting(model)
        before.restore()
        raise
    if not any(layer.tier is Tier.DISK for layer in plan.layers):
        trim(checked)
    _log.info("%s: %s", type(model).__name__, plan)
    return handle


class _Held(NamedTuple):
    """Bytes of a model's weights that are in memory already, so that they are not taken by others."""

    on_host: int  # only what stays there, as a plan counts it
    on_device: int

    @classmethod
    def by(
        cls, model: nn.Module, found: list[Found], sizes: list[LayerSize], device: torch.device
    ) -> "_Held":
        kept = [layer for layer, size in zip(found, sizes, strict=True) if not size.is_on_disk]
        held = {p for layer in kept for p in layer.parameters() if p.device.type == "cpu"}
        return cls(sum(p.numel() * p.element_size() for p in held), nbytes_on(model, device))


def plan(
    model: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    device: str | int | torch.device = "cuda",
    vram: Size = "auto",
    ram: Size = "auto",
    source: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    storage_dtype: torch.dtype | None = None,
    rows: int = _TYPICAL_ROWS,
    inputs: Inputs | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Say what `offload` would do with the same arguments, and what a forward would take; change nothing.

    Args:
        model: A model, or a checkpoint: a mapping whose ``info`` tells dtype and shape, safetensors files,
            or a folder of them. Of files only the headers are read.
        device: As for `offload`, and so are the next five.
        vram: Memory of the device.
        ram: Memory of the host.
        source: Where weights of the model that are on disk come from.
        dtype: In which the model computes.
        storage_dtype: In which weights wait in host memory.
        rows: Rows of the input of a layer, such as tokens times batch, that the time is predicted for.
        inputs: In place of *rows*, what the model will be called with: a mapping of keyword arguments, or a
            sequence of positional ones. Only shapes and dtypes of tensors matter; they may be on ``meta``.
            Then every kind of operation of a forward is tried on the device, attention included, and
            activations are counted: more exact, but it takes several times as long as one block of each kind.
            Needs a model, whose forward does not depend on the values of tensors.
        rates: Of the machine, from `probe`; None: they are measured now, in about a second.

    Raises:
        ConfigError: it cannot fit, or an argument makes no sense, or the forward cannot be foreseen.
    """
    target = parse_device(device)
    _check_arguments(dtype, storage_dtype, rows)
    file = work = None
    held = _Held(0, 0)
    ahead = target.type != "cpu"  # as for files, which safemap.DiskMap reads
    if isinstance(model, nn.Module):
        given = check_source(source, setting="source")
        checked = None if given is None else with_ties(given, model)
        ahead = _fetches_ahead(target, checked)
        found = _find(model)
        sizes = sizes_of(found, checked, dtype, storage_dtype)
        held = _Held.by(model, found, sizes, target)
        file = _file_of(given)
        if inputs is not None:
            work = _work(model, inputs, found, target, dtype, checked)
    elif inputs is not None:
        raise ConfigError(
            f"inputs are of a model, but what is planned is a {type(model).__name__}; pass rows"
        )
    elif is_source(model):
        ahead = _fetches_ahead(target, model)
        sizes = sizes_of_mapping(model, dtype, storage_dtype)
    else:
        files = _paths(model)
        sizes = sizes_of_files(files, dtype, storage_dtype)
        file = str(find_files(files)[0])
    if rates is None:
        rates = probe(target, file=file, dtype=dtype or _computed_in(sizes), rows=rows)
    return _plan(sizes, target, vram, ram, held, rows=rows, rates=rates, fetches_ahead=ahead, work=work)


def _paths(given: object) -> list[str | os.PathLike[str]]:
    several = isinstance(given, Iterable) and not isinstance(given, (str, os.PathLike))
    found: list[object] = [*given] if several else [given]  # type: ignore[misc]
    paths = [path for path in found if isinstance(path, (str, os.PathLike))]
    if not paths or len(paths) < len(found):
        what = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
        raise ConfigError(
            "what is planned must be a torch.nn.Module, a mapping of names to tensors, or paths of "
            f"safetensors files; got {what}"
        )
    return paths


def _work(
    model: nn.Module,
    inputs: Inputs,
    found: list[Found],
    device: torch.device,
    dtype: torch.dtype | None,
    source: Source | None,
) -> Work:
    layers = [layer.name for layer in found]
    return measure_work(model, inputs, layers=layers, device=device, dtype=dtype, source=source)


def _file_of(source: Source | None) -> str | None:
    """Return a file that weights are read from, if *source* tells: its disk is measured."""
    files = getattr(source, "files", None)
    return str(files[0]) if files else None


def _fetches_ahead(device: torch.device, source: Source | None) -> bool:
    """Say whether layers are fetched while others compute; see ``Residency.only_asks_ahead``."""
    return device.type != "cpu" or offered(source, "prefetch") is None


def _computed_in(sizes: list[LayerSize]) -> torch.dtype:
    """Return in which dtype most of a model is computed that keeps the dtypes of its weights."""
    numel, nbytes = sum(size.numel for size in sizes), sum(size.nbytes for size in sizes)
    wide = nbytes > 3 * numel  # bytes an element; halves are computed alike, and eight bits as halves
    return torch.float32 if wide else torch.bfloat16


def _plan(
    sizes: list[LayerSize],
    device: torch.device,
    vram: Size,
    ram: Size,
    held: _Held,
    *,
    rows: int,
    rates: Rates | None,
    fetches_ahead: bool,
    work: Work | None,
) -> Plan:
    host = held.on_host + int(AUTO_SHARE * available_ram()) if ram == "auto" else parse_size(ram, what="ram")
    limit = vram_limit(vram, device, host, held=held.on_device)
    return make_plan(
        sizes,
        device=device,
        vram=limit,
        ram=host,
        rows=rows,
        rates=rates,
        foreign_nbytes=foreign_nbytes(device, held=held.on_device),
        fetches_ahead=fetches_ahead,
        work=work,
    )


def _find(model: nn.Module) -> list[Found]:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"offload manages a torch.nn.Module; got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, ManagedModule):
            raise ConfigError(
                f'layer "{name}" of {type(model).__name__} is managed already; give it back first'
            )
    found = find_layers(model)
    if not found:
        raise ConfigError(f"{type(model).__name__} has no parameters to manage")
    return found


class _Snapshot:
    """What the modules of a model hold, to be restored if managing it fails half-way."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]

    def restore(self) -> None:
        """Let the model be as it was; nothing is read from disk."""
        for module, parameters, buffers in self._held:
            if isinstance(module, LoRAHotLoadMixin) and "lora_A_weights" in module.__dict__:
                module.end_lora_hotload()
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            if isinstance(module, ManagedModule):
                for name in parameters:
                    module.__dict__.pop(name, None)
                detach(module)


def _policy(
    tier: Tier,
    computation: Placement,
    storage_dtype: torch.dtype | None,
    source: Source | None,
) -> Policy:
    host = Placement(_CPU, storage_dtype)
    if source is None:
        if computation.device.type == "cpu" and tier is Tier.DEVICE:
            host = computation
        return Policy(host, host, computation, computation)
    on_host = tier is Tier.HOST
    return Policy(DISK, host if on_host else DISK, computation, computation)


def _check_arguments(dtype: torch.dtype | None, storage_dtype: torch.dtype | None, rows: int) -> None:
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ConfigError(f"rows must be a whole number, 1 or more; got {rows!r}")
    for name, value in (("dtype", dtype), ("storage_dtype", storage_dtype)):
        if value is not None and not isinstance(value, torch.dtype):
            raise ConfigError(f"{name} must be a torch.dtype or None; got {value!r}")
        check_keeps_values(value, setting=name)
    if storage_dtype in FP8 and dtype is None:
        raise ConfigError(
            f"storage_dtype {storage_dtype} needs a dtype to compute in, e.g. dtype=torch.bfloat16"
        )
