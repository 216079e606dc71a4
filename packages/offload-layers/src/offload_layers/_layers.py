"""The documented layer classes: faces over a residency.

``AutoWrappedLinear(linear, ...)`` returns *linear* itself, which from then on is an instance of
``AutoWrappedLinear`` as well as of its own class. Nothing in the model has to be replaced.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from offload_layers._device import OutOfMemory
from offload_layers._errors import ConfigError
from offload_layers._fp8 import FP8
from offload_layers._fp8_matmul import check_computes, check_multiplies
from offload_layers._fp8_matmul import linear as eight_bit_linear
from offload_layers._lora import LoRAHotLoadMixin, with_adapters
from offload_layers._manage import manage
from offload_layers._managed import Forward, ManagedModule, Offered
from offload_layers._placement import GIB, Placement, Policy, parse_limit, parse_placement
from offload_layers._residency import Residency
from offload_layers._schedule import Schedule
from offload_layers._state import State

_IGNORED = frozenset({"quantize", "metadata"})  # passed to every layer, of use to quantized ones only


class _Setting:
    """``offload_device``, ``onload_dtype`` and so on: a part of the layer's policy, readable and settable."""

    def __init__(self, role: str, what: str) -> None:
        self.role = role
        self.what = what

    def __get__(self, module: "AutoTorchModule | None", owner: type | None = None) -> Any:
        if module is None:
            return self
        placement: Placement = getattr(module._owner().policy, self.role)
        return "disk" if placement.is_disk else getattr(placement, self.what)

    def __set__(self, module: "AutoTorchModule", value: object) -> None:
        residency = module._owner()
        before: Placement = getattr(residency.policy, self.role)
        if before.is_disk and value != "disk" and self.what == "device":
            return  # on disk by its dtype: weights stay there when a model is sent to another device
        if self.what == "device":
            after = parse_placement(self.role, before.dtype, value, before)
        else:
            after = parse_placement(self.role, value, None, before)
        if self.role == "computation" and after.dtype in FP8 and before.dtype not in FP8:
            raise ConfigError(
                f'computation_dtype of layer "{residency.name}" cannot become {after.dtype} while it is '
                "managed; enable management with it"
            )
        residency.set_policy(residency.policy.replace(self.role, after))


def _work_of(residency: Residency, args: tuple[Any, ...]) -> float:
    """Return how much there is to compute: rows of the input times elements of the weights."""
    x = args[0] if args else None
    rows = x.numel() // x.shape[-1] if isinstance(x, Tensor) and x.dim() and x.shape[-1] else 1
    return float(rows) * residency.preparing_nbytes


class AutoTorchModule(ManagedModule):
    """A layer that can be sent to disk, to host memory and to the device, and computes from anywhere.

    Wrapping changes the class of *module* in place and returns the same object.

    Args:
        module: The layer. Its parameters may be on ``meta`` if they are kept on disk.
        offload_dtype, offload_device: Where the weights are at rest; ``"disk"`` for both reads them from
            *disk_map* whenever they are needed.
        onload_dtype, onload_device: Where they are once the model is about to be used.
        preparing_dtype, preparing_device: Where they stay between forwards as long as *vram_limit* allows.
        computation_dtype, computation_device: Where and in which dtype the layer computes; the default
            for every setting that is not given.
        vram_limit: GiB of the computation device that may be in use for weights to stay there; None: no
            limit; 0: nothing stays.
        name: Dotted name of the layer in the model, and prefix of its tensors in *disk_map*.
        disk_map: Mapping from names to tensors, e.g. ``safemap.DiskMap``.
        schedule: Shared by the layers of one model; see ``enable_vram_management``, which makes it.

    Raises:
        ConfigError: a setting makes no sense, or the layer is managed already.
        MissingTensorError: a parameter has no values and *disk_map* has none for it.
        ShapeMismatchError: *disk_map* has a tensor of another shape.
    """

    offload_dtype, offload_device = _Setting("offload", "dtype"), _Setting("offload", "device")
    onload_dtype, onload_device = _Setting("onload", "dtype"), _Setting("onload", "device")
    preparing_dtype, preparing_device = _Setting("preparing", "dtype"), _Setting("preparing", "device")
    computation_dtype, computation_device = (
        _Setting("computation", "dtype"),
        _Setting("computation", "device"),
    )

    _covers_children = True  # whether the parameters of inner modules belong to this layer
    _multiplies = False  # whether the layer is a matrix product, which can be had in eight bits

    def __new__(
        cls,
        module: nn.Module,
        offload_dtype: object = None,
        offload_device: object = None,
        onload_dtype: object = None,
        onload_device: object = None,
        preparing_dtype: object = None,
        preparing_device: object = None,
        computation_dtype: object = None,
        computation_device: object = None,
        vram_limit: float | None = None,
        name: str = "",
        disk_map: Mapping[str, Tensor] | None = None,
        schedule: Schedule | None = None,
        **kwargs: object,
    ) -> Any:
        """Manage *module* and return it."""
        if unknown := kwargs.keys() - _IGNORED:
            raise ConfigError(f"{cls.__name__} got an unknown argument {min(unknown)!r}")
        policy = Policy.from_config(
            {
                "offload_dtype": offload_dtype,
                "offload_device": offload_device,
                "onload_dtype": onload_dtype,
                "onload_device": onload_device,
                "preparing_dtype": preparing_dtype,
                "preparing_device": preparing_device,
                "computation_dtype": computation_dtype,
                "computation_device": computation_device,
            }
        )
        limit = parse_limit(vram_limit)
        return cls._manage(module, policy, name=name, source=disk_map, limit=limit, schedule=schedule)

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Do nothing: the module that ``__new__`` returns has been initialised long ago."""

    @classmethod
    def _manage(
        cls,
        module: nn.Module,
        policy: Policy,
        *,
        name: str,
        source: Mapping[str, Tensor] | None,
        limit: int | None,
        schedule: Schedule | None,
    ) -> nn.Module:
        """Manage *module* under *limit* bytes, and return it."""
        policy = cls._policy(policy)
        cls._check(module, policy)
        manage(
            module,
            cls._face(policy),
            policy,
            name=name,
            source=source,
            limit=limit,
            recurse=cls._covers_children,
            schedule=schedule,
        )
        return module

    @classmethod
    def _check(cls, module: nn.Module, policy: Policy) -> None:
        if cls in (AutoTorchModule, LoRAHotLoadMixin):
            raise ConfigError(
                "AutoTorchModule is a base class; wrap layers in AutoWrappedModule or a relative of it"
            )
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{cls.__name__} wraps a torch.nn.Module; got {type(module).__name__}")
        if not cls._multiplies:
            check_computes(module, policy.computation, recurse=cls._covers_children)

    @classmethod
    def _face(cls, policy: Policy) -> "type[AutoTorchModule]":
        """Return the class of layers that follow *policy*."""
        return cls

    @classmethod
    def _policy(cls, policy: Policy) -> Policy:
        """Return the policy that layers of this class follow, given the one that was asked for."""
        return policy

    @classmethod
    def _computing(cls, own_forward: Forward) -> Forward:
        """Return what the layer computes once its weights are there."""
        return own_forward

    @classmethod
    def _managed_forward(cls, own_forward: Forward) -> Forward:
        own_forward = cls._computing(own_forward)

        def forward(self: AutoTorchModule, *args: Any, **kwargs: Any) -> Any:
            residency = self.__dict__.get("_residency")
            if residency is None:  # a hook has given the model back since this call began
                return own_forward(self, *args, **kwargs)
            try:
                if residency.resident:
                    return own_forward(self, *args, **kwargs)
                residency.enter(_work_of(residency, args))
                try:
                    return own_forward(self, *args, **kwargs)
                finally:
                    residency.leave()
            except OutOfMemory:
                if residency.buffers:  # forward may have written to them: running it twice is not the same
                    residency.make_room()
                    raise
            # outside of `except`, which would keep alive what the failed forward has allocated
            return residency.compute_again(lambda: own_forward(self, *args, **kwargs))

        return forward

    # -- the four states ----------------------------------------------------------------------------

    def offload(self) -> None:
        """Send the weights to their OFFLOAD placement: they are not needed soon."""
        self._owner().offload()

    def onload(self) -> None:
        """Bring the weights to their ONLOAD placement: they are needed soon."""
        self._owner().climb_to(State.ONLOAD)

    def preparing(self) -> None:
        """Bring the weights to their PREPARING placement, if they fit under the limit."""
        self._owner().climb_to(State.PREPARING)

    def computation(self) -> Any:
        """Return the module, whose weights read as they are in the computation placement."""
        return self

    # -- what others read on a layer ----------------------------------------------------------------

    @Offered
    def module(self) -> nn.Module:
        """The wrapped module, which is this object."""
        return self

    @Offered
    def name(self) -> str:
        """Dotted name of the layer in its model."""
        return self._owner().name

    @Offered
    def state(self) -> State:
        """Where the weights rest."""
        return self._owner().state

    @property
    def vram_limit(self) -> float | None:
        """GiB of the computation device that may be in use for the weights to stay there."""
        limit = self._owner().limit
        return None if limit is None else limit / GIB

    @vram_limit.setter
    def vram_limit(self, value: float | None) -> None:
        self._owner().limit = parse_limit(value)
        self._owner().obey_limit()

    @property
    def computation_device_type(self) -> str:
        """``"cpu"``, ``"cuda"`` and so on."""
        return self._owner().policy.computation.device.type

    def param_name(self, name: str) -> str:
        """Return the name in the whole model of this layer's parameter *name*."""
        return f"{self.name}.{name}" if self.name else name


class AutoWrappedModule(AutoTorchModule):
    """Any module: its parameters and those of everything inside it move together."""


class AutoWrappedNonRecurseModule(AutoTorchModule):
    """A module whose own parameters are managed here, while its children are managed by themselves."""

    _covers_children = False


class AutoWrappedLinear(LoRAHotLoadMixin, AutoTorchModule, nn.Linear):
    """A linear layer, to which low-rank adapters can be added while it is managed."""

    _multiplies = True

    @classmethod
    def _check(cls, module: nn.Module, policy: Policy) -> None:
        super()._check(module, policy)
        if not isinstance(module, nn.Linear):
            raise ConfigError(
                f"AutoWrappedLinear wraps nn.Linear; got {type(module).__name__}. Use AutoWrappedModule"
            )
        check_multiplies(module, policy.computation)

    @classmethod
    def _face(cls, policy: Policy) -> type[AutoTorchModule]:
        return _EightBitLinear if policy.computation.dtype in FP8 else cls

    @classmethod
    def _manage(cls, module: nn.Module, policy: Policy, **arguments: Any) -> nn.Module:
        layer: Any = super()._manage(module, policy, **arguments)
        layer.init_lora_hotload()
        return module

    @classmethod
    def _managed_forward(cls, own_forward: Forward) -> Forward:
        return with_adapters(super()._managed_forward(own_forward))

    def computation(self) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(out, in)`` and bias ``(out,)`` in the computation placement."""
        return self.weight, self.bias


class _EightBitLinear(AutoWrappedLinear):
    """One that computes in eight-bit floats."""

    @classmethod
    def _computing(cls, own_forward: Forward) -> Forward:
        def multiply(self: nn.Linear, input: Tensor) -> Tensor:
            weight = self.weight
            if weight.dtype in FP8:
                return eight_bit_linear(input, weight, self.bias)
            return own_forward(self, input)  # type: ignore[no-any-return]  # computation_dtype was changed

        return multiply
