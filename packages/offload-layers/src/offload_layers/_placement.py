"""Where weights are and in which dtype: the only place where configurations are parsed.

Outside, people write ``"disk"``, ``"cuda"``, ``0`` and dtypes, in eight separate settings. Inside there
are only ``Placement`` values with an exact device, compared with ``==``; being on disk is the device
``meta``, because that is what the module holds then.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from offload_layers._errors import ConfigError
from offload_layers._state import State

DeviceLike = str | int | torch.device
Disk = Literal["disk"]
_META = torch.device("meta")
_ROLES = ("offload", "onload", "preparing", "computation")
CONFIG_KEYS = tuple(f"{role}_{what}" for role in _ROLES for what in ("dtype", "device"))
GIB = 1024**3


@dataclass(frozen=True)
class Placement:
    """A device and a dtype. ``dtype`` None means the dtype in which the weights are stored.

    The dtype is for floating-point weights; integer and boolean ones keep their own.
    """

    device: torch.device
    dtype: torch.dtype | None = None

    @property
    def is_disk(self) -> bool:
        """Whether the weights are in their source only."""
        return self.device.type == "meta"

    def dtype_for(self, stored: torch.dtype) -> torch.dtype:
        """Return the dtype that a weight stored as *stored* has here."""
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored

    def holds(self, tensor: torch.Tensor) -> bool:
        """Say whether *tensor* is exactly as this placement demands."""
        return tensor.device == self.device and tensor.dtype == self.dtype_for(tensor.dtype)

    def __str__(self) -> str:
        if self.is_disk:
            return "disk"
        return (
            f"{self.device} {'as stored' if self.dtype is None else str(self.dtype).removeprefix('torch.')}"
        )


DISK = Placement(_META)


@dataclass(frozen=True)
class Policy:
    """One placement for each resting state, and the one in which a layer computes."""

    offload: Placement
    onload: Placement
    preparing: Placement
    computation: Placement

    def __post_init__(self) -> None:
        if self.computation.is_disk:
            raise ConfigError(
                "computation_device is missing or on disk; name the device that computes, e.g. 'cuda'"
            )
        resting = [self.offload, self.onload, self.preparing]
        for i, placement in enumerate(resting[1:], start=1):
            if placement.is_disk and not resting[i - 1].is_disk:
                raise ConfigError(
                    f"{_ROLES[i]} is on disk, but {_ROLES[i - 1]} is on {resting[i - 1]}: a layer that gets "
                    f"closer to computation cannot go back to disk. Set {_ROLES[i]}_device to "
                    f'"{resting[i - 1].device}", or {_ROLES[i - 1]}_device to "disk"'
                )

    def __getitem__(self, state: State) -> Placement:
        return {State.OFFLOAD: self.offload, State.ONLOAD: self.onload, State.PREPARING: self.preparing}[
            state
        ]

    def replace(self, role: str, placement: Placement) -> "Policy":
        """Return this policy with another placement for *role*, e.g. ``"onload"``."""
        return dataclasses.replace(self, **{role: placement})

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "Policy":
        """Read the eight settings ``{offload,onload,preparing,computation}_{dtype,device}``.

        A missing setting, or None, means that of the computation. ``"disk"`` as a device or as a dtype
        puts the state on disk.

        Raises:
            ConfigError: an unknown key, a value that is no dtype or device, or a contradiction.
        """
        check_config_keys(config)
        computation = parse_placement(
            "computation", config.get("computation_dtype"), config.get("computation_device"), DISK
        )
        offload, onload, preparing = (
            parse_placement(role, config.get(f"{role}_dtype"), config.get(f"{role}_device"), computation)
            for role in _ROLES[:3]
        )
        return cls(offload, onload, preparing, computation)


def check_config_keys(config: Mapping[str, object]) -> None:
    """Raise ``ConfigError`` for a key which is none of the eight settings."""
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"vram_config must be a dict with the keys {', '.join(CONFIG_KEYS)}; got {config!r}"
        )
    for key in config:
        if key not in CONFIG_KEYS:
            near = difflib.get_close_matches(str(key), CONFIG_KEYS, 1)
            hint = f' Did you mean "{near[0]}"?' if near else f" Known: {', '.join(CONFIG_KEYS)}."
            raise ConfigError(f"vram_config has an unknown key {key!r}.{hint}")


def parse_placement(role: str, dtype: object, device: object, default: Placement) -> Placement:
    """Turn one ``*_dtype`` and one ``*_device`` setting into a placement."""
    if dtype == "disk" and device not in (None, "disk"):
        raise ConfigError(
            f'{role}_dtype is "disk", but {role}_device is {device!r}; set both to "disk", or a dtype'
        )
    if "disk" in (dtype, device):
        return DISK
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ConfigError(f'{role}_dtype must be a torch.dtype, "disk" or None; got {dtype!r}')
    check_keeps_values(dtype, setting=f"{role}_dtype")
    return Placement(
        parse_device(device, setting=f"{role}_device") if device is not None else default.device,
        dtype if dtype is not None else default.dtype,
    )


def check_keeps_values(dtype: torch.dtype | None, *, setting: str) -> None:
    """Raise ``ConfigError`` for a dtype into which floating-point weights are not to be converted."""
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(
            f"{setting} must be a floating-point dtype, since it is for weights that are such; got {dtype}"
        )


def parse_device(device: object, *, setting: str = "device") -> torch.device:
    """Return the exact device: ``"cuda"``, ``"cuda:0"`` and ``0`` are one where 0 is the current device."""
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise ConfigError(
            f'{setting} must be a device such as "cuda", 0 or torch.device("cpu"); got {device!r}'
        )
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{setting} {device!r} is no device that torch knows: {reason}") from error
    if parsed.type == "meta":
        raise ConfigError(f'{setting} is "meta", which holds no values; to keep weights on disk write "disk"')
    if parsed.type == "cpu":
        return torch.device("cpu")
    if parsed.type == "mps":  # there is one, and tensors there name its index
        return torch.device("mps", 0)
    if parsed.index is None:
        try:
            module = torch.get_device_module(parsed)
        except RuntimeError as error:  # a vendor whose module is not loaded
            raise ConfigError(
                f"torch cannot compute on {setting} {device!r} here; choose cpu or cuda, for example"
            ) from error
        return torch.device(parsed.type, module.current_device() if module.is_available() else 0)
    return parsed


def parse_limit(vram_limit: object) -> int | None:
    """Return a limit given in GiB as bytes; None means no limit.

    Raises:
        ConfigError: it is no number, negative, or not a number at all (NaN).
    """
    if vram_limit is None:
        return None
    if isinstance(vram_limit, bool) or not isinstance(vram_limit, (int, float)):
        raise ConfigError(f"vram_limit must be a number of GiB or None (no limit); got {vram_limit!r}")
    if math.isnan(vram_limit) or vram_limit < 0:
        raise ConfigError(f"vram_limit must be zero GiB or more; got {vram_limit!r}")
    return None if math.isinf(vram_limit) else int(vram_limit * GIB)
